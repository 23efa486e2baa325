"""`POST /v1/chat/completions`: a conversation becomes a prompt, and its completion a message.

Knows what OpenAI's chat objects look like. Between the two a chat is a completion like any other
(`server.completions`), of a prompt that a template made.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar, Self

import msgspec
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response

from hnet_runtime.engine.messages import Constraint
from server import errors
from server.chat_shapes import ChatAnswer
from server.chat_templates import ChatTemplate, Rendered
from server.choice import Choice
from server.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionJob,
    truncated,
    usage,
)
from server.conversation import Conversation
from server.responses import described
from server.schemas import CompletionRequest, GenerationRequest, ignored_header, parse, request_body
from server.service import Service
from server.strict_model import wrong
from server.text import BYTE_KEYS, TOKEN_ID_KEYS
from server.unsupported import NO_REASONING, TEXT_ALONE, UNSUPPORTED, Unsupported, among

ROLE = "assistant"

router = APIRouter()
_BYTES = {key: byte for keys in (BYTE_KEYS, TOKEN_ID_KEYS) for byte, key in enumerate(keys)}


_NO_LIFETIME = "is not supported: how long the prefix cache holds a prompt follows from what else is asked"
_NO_TOOLS = "is not supported: the model calls no tools"


class ChatRequest(Conversation, GenerationRequest):
    """The body of `POST /v1/chat/completions`. One token is one byte."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 64}]
        }
    )

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **UNSUPPORTED,
        # OpenAI's
        "tools": Unsupported(among([]), _NO_TOOLS),
        "tool_choice": Unsupported(among("none", "auto"), _NO_TOOLS),
        "parallel_tool_calls": Unsupported(among(True, False), _NO_TOOLS),
        "functions": Unsupported(among([]), _NO_TOOLS),
        "function_call": Unsupported(among("none", "auto"), _NO_TOOLS),
        "modalities": Unsupported(among(["text"]), TEXT_ALONE),
        "audio": Unsupported(among(), TEXT_ALONE),
        "prediction": Unsupported(among()),
        "reasoning_effort": Unsupported(among("none"), NO_REASONING),
        "verbosity": Unsupported(among("medium")),
        "web_search_options": Unsupported(among()),
        "store": Unsupported(among(False), "is not supported: nothing is stored"),
        "metadata": Unsupported(among({}), "is not supported: nothing is stored"),
        "service_tier": Unsupported(among("auto", "default"), "is not supported: there is one tier"),
        "moderation": Unsupported(among()),
        "prompt_cache_options": Unsupported(among({}), _NO_LIFETIME),
        "prompt_cache_retention": Unsupported(among("in_memory"), _NO_LIFETIME),
        # vLLM's
        "include_reasoning": Unsupported(among(True, False), NO_REASONING),
        "return_prompt_text": Unsupported(
            among(False), "is not supported: return_token_ids gives the prompt's bytes as prompt_token_ids"
        ),
        "media_io_kwargs": Unsupported(among({}), TEXT_ALONE),
        "chat_template": Unsupported(among(), "is not supported: the server chooses the template"),
        "documents": Unsupported(among([])),
        "echo": Unsupported(among(False), "is not supported in a chat; only false is accepted"),
        "best_of": Unsupported(among(1), "is not supported in a chat; only 1 is accepted"),
        "mm_processor_kwargs": Unsupported(among({}), TEXT_ALONE),
    }

    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31, description="Bytes to complete at most; what the context leaves where omitted."
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="An older name of max_completion_tokens.")
    logprobs: bool = Field(False, description="Give the log-probability of each byte.")
    top_logprobs: int | None = Field(None, ge=0, le=256, description="Most probable bytes listed beside each.")
    safety_identifier: str | None = Field(None, description="Taken, and used for nothing, as `user` is.")
    prompt_cache_key: str | None = Field(None, description="Taken, and used for nothing: there is one prefix cache.")

    @model_validator(mode="after")
    def _agreement(self) -> Self:
        if self.top_logprobs and not self.logprobs:  # 0 of nothing is nothing
            raise wrong("top_logprobs", "only allowed when logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens", "differs from max_completion_tokens")
        return self

    def completion(self, rendered: Rendered, max_model_len: int) -> CompletionRequest:
        """The completion that this chat comes to. Raises ApiError (400) where the two do not fit the context."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked: int | None = getattr(self, name)
        most = self.truncate_prompt_tokens
        if most == -1:
            most = max(max_model_len - (DEFAULT_MAX_TOKENS if asked is None else asked), 1)
        data = truncated(rendered.data, most, is_text=True)
        if not data:
            raise errors.invalid("messages: the chat template made an empty prompt of them", "messages")
        if len(data) >= max_model_len:
            raise errors.invalid(
                f"messages: {len(data)} bytes as a prompt (BOS included) leave no room to complete; "
                f"the model's context is {max_model_len} bytes",
                "messages",
                "context_length_exceeded",
            )
        if asked is not None and len(data) + asked > max_model_len:
            raise errors.invalid(
                f"{name}: {asked} after a prompt of {len(data)} bytes (BOS included) is more than "
                f"the model's context of {max_model_len} bytes",
                name,
                "context_length_exceeded",
            )
        shared = {field: getattr(self, field) for field in GenerationRequest.model_fields}
        return CompletionRequest.model_construct(
            **{
                **shared,
                "truncate_prompt_tokens": None,
                "prompt": [data],
                "max_tokens": max_model_len - len(data) if asked is None else asked,
                "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
                "stop": [*(self.stop or ()), *rendered.stop],
            }
        )


@router.post(
    "/v1/chat/completions",
    openapi_extra=request_body(ChatRequest),
    responses=described(ChatAnswer, streams=True),
)
async def create_chat_completion(request: Request) -> Response:
    """Answers a conversation, whole or as a stream of server-sent events."""
    service: Service = request.app.state.service
    template: ChatTemplate = request.app.state.chat_template
    body = await request.body()
    service.admission.check()
    chat, unknown = parse(body, ChatRequest)
    service.check_model(chat.model)
    rendered = await chat.render(template)
    completion = chat.completion(rendered, service.info.max_model_len)
    job = ChatJob(service, completion, request.state.request_id, await service.constraint(completion))
    return await job.answer(request, ignored_header([*unknown, *chat.ignored(template)]))


class ChatJob(CompletionJob):
    """A completion whose choices are told as messages."""

    KIND = "chatcmpl"

    def __init__(
        self, service: Service, completion: CompletionRequest, request_id: str, constraint: Constraint | None
    ) -> None:
        super().__init__(service, completion, request_id, constraint)
        self._begun: set[int] = set()  # choices whose role has been said

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._request.stream else "chat.completion"
        return {**super()._head(), "object": kind}

    def _encode(self) -> bytes:
        choices = []
        for choice in self._choices.values():
            shown = choice.take()
            assert shown is not None, "a choice that has ended has something to show"
            message = {"role": ROLE, "content": shown["text"], "refusal": None}
            choices.append(self._told(shown, message=message))
        document = {**self._head(), "choices": choices, "usage": self._usage()}
        prompts = [choice.pop("prompt_logprobs") for choice in choices if "prompt_logprobs" in choice]
        if prompts:  # of one prompt; where vLLM has them
            document["prompt_logprobs"] = prompts[0]
        return msgspec.json.encode(document)

    def _event(self, choice: Choice) -> bytes:
        shown = choice.take()
        if shown is None:
            return b""
        told = [self._told(shown, delta={"content": shown["text"]} if shown["text"] else {})]
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            role = {"role": ROLE, "content": ""}
            told.insert(0, {"index": choice.index, "delta": role, "logprobs": None, "finish_reason": None})
        options = self._request.stream_options
        extra: dict[str, Any] = {}
        if options is not None and options.continuous_usage_stats:
            extra["usage"] = usage(self._firsts, [choice])
        elif options is not None and options.include_usage:
            extra["usage"] = None
        return b"".join([self._template.event({"choices": [item], **extra}) for item in told])

    def _told(self, shown: dict[str, Any], **words: dict[str, Any]) -> dict[str, Any]:
        """A completion's choice as a chat's, and what only this server adds as it is."""
        logprobs = shown["logprobs"]
        rest = {key: value for key, value in shown.items() if key not in ("index", "text", "logprobs", "finish_reason")}
        return {
            "index": shown["index"],
            **words,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": shown["finish_reason"],
            **rest,
        }

    def _logprobs(self, arrays: dict[str, list[Any]]) -> dict[str, Any]:
        """Parallel arrays as one object a byte; of alternatives those that were asked for, the most probable first."""
        columns = (arrays[name] for name in ("tokens", "token_logprobs", "bytes", "top_logprobs"))
        content = [
            {
                "token": token,
                "logprob": logprob,
                "bytes": data,
                "top_logprobs": [
                    {"token": key, "logprob": value, "bytes": [_BYTES[key]]}
                    for key, value in islice(top.items(), self._request.logprobs)
                ],
            }
            for token, logprob, data, top in zip(*columns, strict=True)
        ]
        return {"content": content, "refusal": None}
