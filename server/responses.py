"""The shapes of answers, for the OpenAPI document; what an answer is made of is other modules' business."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """Has these names and no others; those with a default may be absent."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None = Field(description="The dotted name of the parameter at fault.")
    code: str | None


class ErrorAnswer(Shape):
    error: ErrorDetail


class ChunkShape(Shape):
    stage: int = Field(ge=1)
    start: int = Field(ge=0, description="Offset of its first byte; the prompt's first is 0.")
    p: float = Field(ge=0, le=1)


class LogprobShape(Shape):
    logprob: float = Field(le=0)
    rank: int = Field(ge=1, le=256)
    decoded_token: str


class LogprobArrays(Shape):
    """Parallel arrays, an entry a byte; null for the first byte of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    token_ids: list[int]
    bytes: list[list[int]]


class CompletionChoice(Shape):
    index: int = Field(ge=0)
    text: str
    logprobs: LogprobArrays | None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = Field(description="Null while it goes on.")
    stop_reason: str | int | None
    token_ids: list[int] = Field([], description="With `return_token_ids`.")
    prompt_token_ids: list[int] = Field([], description="With `return_token_ids`.")
    prompt_logprobs: list[dict[str, LogprobShape] | None] = Field([], description="With `prompt_logprobs`.")
    chunks: list[ChunkShape] = Field([], description="With `return_chunks`.")
    error: str = Field("", description="Why, where `finish_reason` is `error`.")


class PromptDetails(Shape):
    cached_tokens: int = Field(ge=0)


class CompletionDetails(Shape):
    chunks: list[int] = Field([], description="Of each stage, stage 1 first; once the request has ended.")


class UsageShape(Shape):
    """In bytes."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ReadShape(Shape):
    """The usage of a text that is read and not gone on with, in bytes."""

    prompt_tokens: int = Field(ge=1)
    completion_tokens: Literal[0]
    total_tokens: int = Field(ge=1)


class CompletionAnswer(Shape):
    """A completion, or an event of one that streams."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[CompletionChoice]
    usage: UsageShape | None = Field(None, description="Null or absent in the events of a stream that have none.")


_ERRORS = {
    400: "The request is wrong; `param` names what.",
    401: "No key, or a wrong one.",
    404: "The model is not served here.",
    413: "The body is too large.",
    429: "Too much waits already; see `Retry-After`.",
    500: "The engine failed while it worked on the request.",
    503: "The server is overloaded, loading, draining or without its engine; see `Retry-After`.",
    504: "The request did not end within the server's time for one.",
}


def described(
    answer: type[BaseModel], *, streams: bool = False, errors: Iterable[int] = tuple(_ERRORS)
) -> dict[int | str, dict[str, Any]]:
    """What FastAPI is told of a route's answers: the model of a good one, and of errors. Nothing is checked by it."""
    good: dict[str, Any] = {"model": answer, "description": "The answer."}
    if streams:
        good["description"] = "The answer; with `stream`, events of the same shape and then `[DONE]`."
        good["content"] = {"text/event-stream": {}}
    return {200: good, **{status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in errors}}
