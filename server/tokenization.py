"""`POST /tokenize` and `/detokenize`: texts and chats to bytes and back, in vLLM's shapes. One token is one byte."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, field_validator
from starlette.responses import Response

from hnet_runtime.config import BOS
from server.chat_templates import ChatTemplate
from server.completions import MANY_NUMBERS
from server.conversation import Conversation
from server.responses import Shape, described
from server.schemas import byte_ids, ignored_header, parse, request_body
from server.service import Service
from server.strict_model import StrictModel, utf8
from server.text import BYTE_KEYS

router = APIRouter()


class TokenizeRequest(StrictModel):
    """The body of `POST /tokenize` with a text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Once upon a time"}]})

    model: str | None = Field(None, description="The name served here, or nothing.")
    prompt: str
    add_special_tokens: bool = Field(True, description="Prepend BOS (byte 254).")
    return_token_strs: bool = Field(False, description="Name each byte as logprobs do.")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        utf8(value)
        return value


class TokenizeChatRequest(Conversation):
    """The body of `POST /tokenize` with messages."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello"}]}]})

    model: str | None = Field(None, description="The name served here, or nothing.")
    return_token_strs: bool = Field(False, description="Name each byte as logprobs do.")


class DetokenizeRequest(StrictModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [254, 72, 105]}]})

    model: str | None = Field(None, description="The name served here, or nothing.")
    tokens: Any = Field(
        description="A list of bytes (0–255).",
        json_schema_extra={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
    )

    @field_validator("tokens")
    @classmethod
    def _tokens(cls, value: Any) -> bytes:
        return b"" if value == [] else byte_ids(value, "")


class TokenizeAnswer(Shape):
    count: int = Field(ge=0)
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Shape):
    prompt: str


class _Form(msgspec.Struct):
    """Which of its two forms a body of `POST /tokenize` has."""

    messages: msgspec.Raw = msgspec.Raw(b"null")


def _either_body() -> dict[str, Any]:
    """`request_body` of the two forms."""
    body = request_body(TokenizeRequest)
    text = body["requestBody"]["content"]["application/json"]
    chat = request_body(TokenizeChatRequest)["requestBody"]["content"]["application/json"]
    text["schema"] = {"anyOf": [text["schema"], chat["schema"]]}
    return body


@router.post(
    "/tokenize",
    responses=described(TokenizeAnswer),
    openapi_extra=_either_body(),
)
async def tokenize(request: Request) -> Response:
    """The bytes of a text, or of a chat as the model would read it."""
    service: Service = request.app.state.service
    body = await request.body()
    info = service.admission.check_loaded()
    if _has_messages(body):
        template: ChatTemplate = request.app.state.chat_template
        chat, unknown = parse(body, TokenizeChatRequest)
        service.check_model(chat.model)
        data, named = (await chat.render(template)).data, chat.return_token_strs
        unknown += chat.ignored(template)
    else:
        text, unknown = parse(body, TokenizeRequest)
        service.check_model(text.model)
        data, named = text.prompt.encode(), text.return_token_strs
        if text.add_special_tokens:
            data = bytes((BOS,)) + data
    if len(data) > MANY_NUMBERS:
        answer = await asyncio.to_thread(_tokens, data, info.max_model_len, named)
    else:
        answer = _tokens(data, info.max_model_len, named)
    return Response(answer, headers=ignored_header(unknown), media_type="application/json")


@router.post(
    "/detokenize",
    responses=described(DetokenizeAnswer),
    openapi_extra=request_body(DetokenizeRequest),
)
async def detokenize(request: Request) -> Response:
    """The text of bytes: without BOS in front, and with U+FFFD for what is no text."""
    service: Service = request.app.state.service
    body = await request.body()
    service.admission.check_loaded()
    wanted, unknown = parse(body, DetokenizeRequest)
    service.check_model(wanted.model)
    data: bytes = wanted.tokens
    text = data.removeprefix(bytes((BOS,))).decode("utf-8", "replace")
    return Response(
        msgspec.json.encode({"prompt": text}), headers=ignored_header(unknown), media_type="application/json"
    )


def _has_messages(body: bytes) -> bool:
    """What is no JSON object has none; `parse` says what is wrong with it."""
    try:
        return bytes(msgspec.json.decode(body, type=_Form).messages) != b"null"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:  # for a message with a lone surrogate, which is to be named
            document = json.loads(body)
        except (ValueError, RecursionError):
            return False
        return isinstance(document, dict) and document.get("messages") is not None


def _tokens(data: bytes, max_model_len: int, named: bool) -> bytes:
    return msgspec.json.encode(
        {
            "count": len(data),
            "max_model_len": max_model_len,
            "tokens": list(data),
            "token_strs": [BYTE_KEYS[byte] for byte in data] if named else None,
        }
    )
