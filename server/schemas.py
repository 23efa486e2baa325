"""The shapes of requests, checked field by field.

Knows names, types and ranges; what depends on the model served (lengths) is checked in
`server.completions`. Types are strict: a number in quotes, a fraction for a count or a boolean
for a number is an error, and null means the default everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.errors import ApiError, invalid, unsupported
from server.unsupported import UNSUPPORTED

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_N = 128
MAX_CACHE_SALT = 256
MAX_HEADER = 1024
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1

Prompt = str | bytes  # text, or bytes to be taken verbatim


class _Strict(BaseModel):
    """Null means the default; names nobody knows are remembered, not refused."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if item is not None}
        return value


class StreamOptions(_Strict):
    include_usage: bool = Field(False, description="End the stream with an event that carries the usage.")
    continuous_usage_stats: bool = Field(False, description="Carry the usage so far in every event.")


class CompletionRequest(_Strict):
    """The body of `POST /v1/completions`. One token is one byte."""

    model: str | None = Field(None, description="The name served here, or nothing.")
    prompt: Any = Field(
        description="A text, a list of texts, a list of bytes (0–255, taken verbatim), or a list of such lists.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
                    "minItems": 1,
                },
            ]
        },
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31, description="Bytes to complete at most; 16 where omitted.")
    n: int = Field(1, ge=1, le=MAX_N, description="Choices per prompt.")
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="Only the value of `n` is supported.")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, description="0 and -1 keep all bytes.")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=MIN_SEED, le=MAX_SEED, description="Fixes the bytes, whatever else is served.")
    stop: Any = Field(
        None,
        description=f"A text, or up to {MAX_STOP_STRINGS}, that end the completion and are left out of it.",
        json_schema_extra={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
            ]
        },
    )
    logprobs: int | None = Field(None, ge=0, le=256, description="Most probable bytes listed beside each byte's own.")
    echo: bool = Field(False, description="Put the prompt before the completion.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int = Field(1, ge=1, le=2**31, description="Bytes an event of a stream carries at least.")
    ignore_eos: bool = False
    add_special_tokens: bool = Field(True, description="Prepend BOS (byte 254) to a prompt that is text.")
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = Field(False, description="Name bytes `token_id:N` in logprobs.")
    return_chunks: bool = Field(False, description="List the chunk boundaries of prompt and completion.")
    utf8: Literal["strict", "raw"] = Field("strict", description="Well-formed text by construction, or any byte.")
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CACHE_SALT,
        description="Only requests of the same salt share what the prefix cache holds.",
    )
    user: str | None = None
    request_id: str | None = Field(None, max_length=256)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: Any) -> list[Prompt]:
        return prompts(value, "prompt")

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> list[bytes]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise _wrong("must be a string or a list of strings")
        if len(values) > MAX_STOP_STRINGS:
            raise _wrong(f"has {len(values)} strings; at most {MAX_STOP_STRINGS} are allowed")
        encoded = [utf8(item) for item in values]
        if not all(encoded):
            raise _wrong("must not contain an empty string")
        if max(map(len, encoded), default=0) > MAX_STOP_BYTES:
            raise _wrong(f"has a string of more than {MAX_STOP_BYTES} bytes")
        return encoded

    @field_validator("cache_salt")
    @classmethod
    def _cache_salt(cls, value: str) -> str:
        utf8(value)
        return value

    @model_validator(mode="after")
    def _agreement(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: only allowed when stream is true")
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("best_of", f"best_of: only the value of n ({self.n}) is supported")
        return self


class SegmentRequest(_Strict):
    """The body of `POST /v1/segment`."""

    model: str | None = None
    input: Any = Field(
        description="A text (BOS is prepended and is offset 0), or a list of bytes (0–255, taken verbatim).",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 1},
            ]
        },
    )

    @field_validator("input")
    @classmethod
    def _input(cls, value: Any) -> Prompt:
        if isinstance(value, list) and value and not isinstance(value[0], int):
            raise _wrong("must be a string or a list of byte ids")
        return prompts(value, "input")[0]


def prompts(value: Any, name: str) -> list[Prompt]:
    """A prompt in any of its four forms → one text or byte string each."""
    if isinstance(value, str):
        utf8(value)
        return [value]
    if not isinstance(value, list):
        raise _wrong("must be a string, a list of strings, a list of byte ids or a list of such lists")
    if not value:
        raise _wrong("must not be empty")
    if isinstance(value[0], str):
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise _wrong(f"[{index}] is not a string like the items before it")
            utf8(item, f"[{index}] ")
        return list(value)
    if isinstance(value[0], list):
        return [_byte_ids(item, f"[{index}]") for index, item in enumerate(value)]
    return [_byte_ids(value, "")]


def utf8(text: str, where: str = "") -> bytes:
    """The bytes of a text; a lone surrogate is an error."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _wrong(f"{where}has a lone surrogate, which no text can contain") from None


def _byte_ids(value: Any, where: str) -> bytes:
    if not isinstance(value, list):
        raise _wrong(f"{where} is not a list of byte ids like the items before it")
    if not value:
        raise _wrong(f"{where} is an empty list of byte ids".lstrip())
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= 255:
        return bytes(value)
    wrong = next(i for i, item in enumerate(value) if type(item) is not int or not 0 <= item <= 255)
    raise _wrong(f"{where}[{wrong}] is not a byte id: a whole number from 0 to 255")


def _wrong(what: str) -> PydanticCustomError:
    # The text may hold braces of the client's, which the template must not see.
    return PydanticCustomError("value", "{what}", {"what": what})


# ── from the body of a request to a checked model ───────────────────────────────────────────────

Model = TypeVar("Model", bound=_Strict)


def parse(body: bytes, model: type[Model]) -> tuple[Model, list[str]]:
    """A JSON body → the checked request and the names in it that nobody knows.

    Raises ApiError (400) that names the first parameter at fault.
    """
    document = _json(body)
    if not isinstance(document, dict):
        raise invalid("The request body must be a JSON object.")
    if model is CompletionRequest:
        _refuse_unsupported(document)
    try:
        request = model.model_validate(document)
    except ValidationError as error:
        raise _explain(error) from None
    return request, _unknown(document, model)


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names the parameters nobody knows; a name that does not fit a header is escaped."""
    if not names:
        return {}
    shown = [name.encode("ascii", "backslashreplace").decode() for name in names]
    shown = ["".join(c if c.isprintable() and c != "," else f"\\x{ord(c):02x}" for c in name) for name in shown]
    return {"x-ignored-params": ", ".join(shown)[:MAX_HEADER].strip()}


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The slower parser tells what is wrong, and reads lone surrogates, for whom a field is to be named.
        try:
            return json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise invalid(f"The request body is not valid JSON: {reason}", code="invalid_json") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_unsupported(document: Mapping[str, Any]) -> None:
    for name, rule in UNSUPPORTED.items():
        value = document.get(name)
        if value is not None and not rule.harmless(value):
            raise unsupported(name, f"{name}: {rule.why}")


def _unknown(document: Mapping[str, Any], model: type[_Strict]) -> list[str]:
    names = [name for name in document if name not in model.model_fields and name not in UNSUPPORTED]
    options = document.get("stream_options")
    if model is CompletionRequest and isinstance(options, dict):
        names += [f"stream_options.{name}" for name in options if name not in StreamOptions.model_fields]
    return names


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(map(str, first["loc"]))
    if not param:  # an error between fields names its own
        return invalid(first["msg"], first["type"])
    if first["type"] == "missing":
        return invalid(f"{param}: is required", param)
    text = first["msg"]
    return invalid(f"{param}{'' if text.startswith('[') else ': '}{text[:1].lower()}{text[1:]}", param)
