"""`POST /v1/score`: how probable a model finds a text, byte by byte."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from hnet_runtime.engine import messages
from server.completions import CLIENT_CLOSED_REQUEST, MANY_NUMBERS
from server.reading import read_input
from server.responses import ReadShape, Shape, described
from server.schemas import SegmentRequest, ignored_header, parse, request_body
from server.scoring import byte_logprobs, score
from server.service import Service

router = APIRouter()


class ScoreRequest(SegmentRequest):
    """The body of `POST /v1/score`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Once upon a time"}]})


class ScoreAnswer(Shape):
    object: Literal["score"]
    model: str
    input_bytes: int = Field(ge=1)
    logprobs: list[float | None] = Field(min_length=1, description="Of each byte; null for the first.")
    bits_per_byte: float | None = Field(description="Null where the first byte is the only one.")
    usage: ReadShape


@router.post(
    "/v1/score",
    responses=described(ScoreAnswer),
    openapi_extra=request_body(ScoreRequest),
)
async def score_input(request: Request) -> Response:
    """The log-probability of each byte of a text after those before it, and the bits per byte that they come to."""
    service: Service = request.app.state.service
    body = await request.body()
    service.admission.check()
    wanted, unknown = parse(body, ScoreRequest)
    service.check_model(wanted.model)
    params = messages.SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, utf8="raw")
    output = await read_input(request, service, wanted.input, params, verb="score", prefix="score")
    if output is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    many = len(output.prompt_logprobs) > MANY_NUMBERS
    answer = await asyncio.to_thread(_encode, service, output) if many else _encode(service, output)
    return Response(answer, headers=ignored_header(unknown), media_type="application/json")


def _encode(service: Service, output: messages.Output) -> bytes:
    logprobs = byte_logprobs(output.prompt_logprobs)
    return msgspec.json.encode(score(service.model_name, logprobs, len(logprobs) + 1))
