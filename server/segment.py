"""`POST /v1/segment`: where a model cuts a text, stage by stage."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hnet_runtime.engine import messages
from server.completions import CLIENT_CLOSED_REQUEST
from server.reading import read_input
from server.schemas import SegmentRequest, ignored_header, parse, request_body
from server.segmentation import segmentation
from server.service import Service

router = APIRouter()


@router.post(
    "/v1/segment",
    openapi_extra=request_body(SegmentRequest),
)
async def segment(request: Request) -> Response:
    """Chunk boundaries of a text: for every stage the offsets, their probabilities and bytes per chunk."""
    service: Service = request.app.state.service
    body = await request.body()
    service.admission.check()
    wanted, unknown = parse(body, SegmentRequest)
    service.check_model(wanted.model)
    params = messages.SamplingParams(max_tokens=0, temperature=0.0, return_chunks=True, utf8="raw")
    output = await read_input(request, service, wanted.input, params, verb="segment", prefix="seg")
    if output is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    assert output.usage is not None, "it has ended"
    document = segmentation(service.model_name, output.chunks, output.usage.prompt_bytes, len(service.info.stages))
    return JSONResponse(document, headers=ignored_header(unknown))
