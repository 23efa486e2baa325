"""The shapes of a chat's answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.responses import ChunkShape, LogprobShape, Shape, UsageShape


class Alternative(Shape):
    token: str
    logprob: float = Field(le=0)
    bytes: list[int] = Field(min_length=1, max_length=1)


class ByteShape(Alternative):
    top_logprobs: list[Alternative] = Field(description="The most probable first.")


class ChatLogprobs(Shape):
    content: list[ByteShape] = Field(description="An object for each byte.")
    refusal: None


class AnswerMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(Shape):
    role: Literal["assistant"] = Field("assistant", description="In the first event of a choice.")
    content: str = ""


class _AnyChoice(Shape):
    index: int = Field(ge=0)
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = Field(description="Null while it goes on.")
    stop_reason: str | int | None = None
    token_ids: list[int] = Field([], description="With `return_token_ids`.")
    prompt_token_ids: list[int] = Field([], description="With `return_token_ids`.")
    chunks: list[ChunkShape] = Field([], description="With `return_chunks`.")
    error: str = Field("", description="Why, where `finish_reason` is `error`.")


class ChatChoice(_AnyChoice):
    message: AnswerMessage


class ChunkChoice(_AnyChoice):
    delta: Delta


class _AnyAnswer(Shape):
    id: str
    created: int
    model: str
    system_fingerprint: None


class ChatAnswer(_AnyAnswer):
    """An answer that was not streamed."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageShape
    prompt_logprobs: list[dict[str, LogprobShape] | None] = Field([], description="With `prompt_logprobs`.")


class ChatChunk(_AnyAnswer):
    """An event of one that streams."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: UsageShape | None = Field(None, description="Null or absent in the events of a stream that have none.")
