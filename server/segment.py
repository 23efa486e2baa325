"""`POST /v1/segment`: where a model cuts a text, stage by stage."""

from __future__ import annotations

import itertools

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hnet_runtime.engine import messages
from server import errors
from server.completions import CLIENT_CLOSED_REQUEST, prompt_bytes, unless_disconnected
from server.engine_client import OutputStream
from server.schemas import SegmentRequest, ignored_header, parse
from server.segmentation import segmentation
from server.service import Service

router = APIRouter()
_serial = itertools.count()


@router.post(
    "/v1/segment",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": SegmentRequest.model_json_schema()}},
        }
    },
)
async def segment(request: Request) -> Response:
    """Chunk boundaries of a text: for every stage the offsets, their probabilities and bytes per chunk."""
    service: Service = request.app.state.service
    body = await request.body()
    service.admission.check()
    wanted, unknown = parse(body, SegmentRequest)
    service.check_model(wanted.model)
    data = prompt_bytes(wanted.input, add_special_tokens=True)
    limit = service.info.max_model_len
    if len(data) > limit:
        raise errors.invalid(
            f"input: {len(data)} bytes (BOS included) are more than the model's context of {limit} bytes",
            "input",
            "context_length_exceeded",
        )
    job = messages.Request(
        request_id=f"seg-{request.state.request_id}-{next(_serial)}",
        prompt=data,
        params=messages.SamplingParams(max_tokens=0, temperature=0.0, return_chunks=True, utf8="raw"),
    )
    with service.client.submit(job) as stream:
        output = await unless_disconnected(request, _whole(stream))
    if output is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if output.finish_reason == "error":
        raise errors.ApiError(500, f"The engine could not segment the input: {output.error}", type="server_error")
    document = segmentation(service.model_name, output.chunks, len(data), len(service.info.stages))
    return JSONResponse(document, headers=ignored_header(unknown))


async def _whole(stream: OutputStream) -> messages.Output:
    await stream.until_ended()
    (output,) = await stream.take()
    return output
