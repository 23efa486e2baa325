"""`POST /v1/segment`: where a model cuts a text, stage by stage."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from hnet_runtime.engine import messages
from server.completions import CLIENT_CLOSED_REQUEST
from server.reading import read_input
from server.responses import ReadShape, Shape, described
from server.schemas import SegmentRequest, ignored_header, parse, request_body
from server.segmentation import segmentation
from server.service import Service

router = APIRouter()


class StageSegments(Shape):
    stage: int = Field(ge=1)
    boundaries: list[int] = Field(description="Offsets of the chunks' first bytes; BOS is offset 0.")
    probabilities: list[float]
    bytes_per_chunk: float | None = Field(description="Null where the stage has no chunk.")


class SegmentAnswer(Shape):
    object: Literal["segmentation"]
    model: str
    input_bytes: int = Field(ge=1)
    stages: list[StageSegments]
    usage: ReadShape


@router.post(
    "/v1/segment",
    responses=described(SegmentAnswer),
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
