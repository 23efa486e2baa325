"""The shapes of requests, checked field by field.

Knows names, types and ranges; what depends on the model served (lengths) is checked in
`server.completions`. Types are strict: a number in quotes, a fraction for a count or a boolean
for a number is an error, and null means the default everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

import msgspec
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.engine.messages import Constraint
from server.errors import ApiError, invalid, unsupported
from server.strict_model import StrictModel, invalid_value, utf8, wrong
from server.structured import ResponseFormat, StructuredOutputs
from server.unsupported import UNSUPPORTED, Unsupported

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_BAD_WORDS = 64
MAX_N = 128
MAX_CACHE_SALT = 256
MAX_HEADER = 1024
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1

_BYTE_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
_NULL: dict[str, Any] = {"type": "null"}
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "inhabitants": {"type": "integer", "minimum": 0}},
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}
_BYTE_KEY = re.compile("0|[1-9][0-9]{0,2}")

Prompt = str | bytes  # text, or bytes to be taken verbatim


class StreamOptions(StrictModel):
    include_usage: bool = Field(False, description="End the stream with an event that carries the usage.")
    continuous_usage_stats: bool = Field(False, description="Carry the usage so far in every event.")
    include_obfuscation: Literal[False] = Field(False, description="Events are not padded.")


_NESTED: dict[str, type[StrictModel]] = {"stream_options": StreamOptions, "structured_outputs": StructuredOutputs}


class GenerationRequest(StrictModel):
    """What requests for completions of any kind share: how bytes are drawn, when they end, how they are told."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = UNSUPPORTED

    model: str | None = Field(None, description="The name served here, or nothing.")
    n: int = Field(1, ge=1, le=MAX_N, description="Choices per prompt.")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, description="0 and -1 keep all bytes.")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(
        None, ge=MIN_INTEGER, le=MAX_INTEGER, description="Fixes the bytes, whatever else is served."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, allow_inf_nan=False, description="Taken off the logit of each byte that the completion has."
    )
    frequency_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="Taken off a byte's logit for each time the completion has it.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Divides positive logits of the bytes in prompt and completion, and multiplies negative ones.",
    )
    logit_bias: Any = Field(
        None,
        description="Byte (0–255) → what is added to its logit, −100 to 100.",
        examples=[{"10": -100, "32": 1.5}],
        json_schema_extra={
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,2})$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                _NULL,
            ]
        },
    )
    allowed_token_ids: Any = Field(
        None,
        description="The only bytes that may come; EOS (255) among them or not.",
        examples=[[48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 255]],
        json_schema_extra={"anyOf": [{**_BYTE_IDS, "minItems": 1}, _NULL]},
    )
    bad_words: Any = Field(
        None,
        description=f"Up to {MAX_BAD_WORDS} texts that the completion never has.",
        examples=[["colour", "\n\n"]],
        json_schema_extra={
            "anyOf": [
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_BAD_WORDS},
                _NULL,
            ]
        },
    )
    min_tokens: int = Field(0, ge=0, le=2**31, description="Bytes before which the completion does not end by itself.")
    stop: Any = Field(
        None,
        description=f"A text, or up to {MAX_STOP_STRINGS}, that end the completion and are left out of it.",
        examples=["\n", ["\n\n", "The end"]],
        json_schema_extra={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
                _NULL,
            ]
        },
    )
    stop_token_ids: Any = Field(
        None,
        description="Bytes (0–255) that end the completion and are left out of it.",
        examples=[[10]],
        json_schema_extra={"anyOf": [_BYTE_IDS, _NULL]},
    )
    include_stop_str_in_output: bool = Field(False, description="Leave in what ended the completion, but EOS.")
    ignore_eos: bool = Field(False, description="Go on after EOS (255).")
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=2**31,
        description="Most bytes of the prompt that are read, its last ones; -1: as many as leave room to complete.",
    )
    prompt_logprobs: int | None = Field(
        None, ge=-1, le=256, description="Most probable bytes listed for each place of the prompt; -1 lists all 256."
    )
    priority: int = Field(
        0, ge=MIN_INTEGER, le=MAX_INTEGER, description="Of the requests that wait, the lowest number goes first."
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="What the completion has to be.",
        examples=[{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="What the completion has to be.",
        examples=[{"json": _SCHEMA}, {"regex": "[0-9]{3}-[0-9]{4}"}, {"choice": ["yes", "no"]}],
    )
    utf8: Literal["strict", "raw"] = Field("strict", description="Well-formed text by construction, or any byte.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int = Field(1, ge=1, le=2**31, description="Bytes an event of a stream carries at least.")
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = Field(False, description="Name bytes `token_id:N` in logprobs.")
    return_chunks: bool = Field(False, description="List the chunk boundaries of prompt and completion.")
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CACHE_SALT,
        description="Only requests of the same salt share what the prefix cache holds.",
    )
    user: str | None = Field(None, description="Taken, and used for nothing.")
    session_id: str | None = Field(None, description="Taken, and used for nothing, as `user` is.")
    request_id: str | None = Field(None, max_length=256)

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> list[bytes]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise invalid_value("must be a string or a list of strings")
        return _strings(values, MAX_STOP_STRINGS)

    @field_validator("bad_words")
    @classmethod
    def _bad_words(cls, value: Any) -> list[bytes]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise invalid_value("must be a list of strings")
        return _strings(value, MAX_BAD_WORDS)

    @field_validator("allowed_token_ids")
    @classmethod
    def _allowed_token_ids(cls, value: Any) -> list[int]:
        return sorted(set(byte_ids(value, "")))

    @field_validator("stop_token_ids")
    @classmethod
    def _stop_token_ids(cls, value: Any) -> list[int]:
        return [] if value == [] else sorted(set(byte_ids(value, "")))

    @field_validator("logit_bias")
    @classmethod
    def _logit_bias(cls, value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise invalid_value("must be an object of byte ids and numbers")
        biases = {}
        for key, bias in value.items():
            byte = int(key) if isinstance(key, int) or _BYTE_KEY.fullmatch(key) else VOCAB_SIZE
            if isinstance(key, bool) or not 0 <= byte < VOCAB_SIZE:
                raise invalid_value(f"{key!r} is not a byte id: a whole number from 0 to 255")
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise invalid_value(f"the bias of byte {byte} is not a number from -100 to 100")
            biases[byte] = float(bias)
        return biases

    @field_validator("cache_salt")
    @classmethod
    def _cache_salt(cls, value: str) -> str:
        utf8(value)
        return value

    @model_validator(mode="after")
    def _between_fields(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise wrong("prompt_logprobs", "not available when stream is true")
        if self.response_format is not None and self.response_format.type != "text" and self.structured_outputs:
            raise wrong("structured_outputs", "not allowed beside a response_format other than text")
        if self.truncate_prompt_tokens == 0:
            raise wrong("truncate_prompt_tokens", "0 would leave no prompt")
        return self

    def constraint(self) -> tuple[Constraint, str] | None:
        """What the completion has to be, and which parameter says so. Raises ApiError (400)."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        return None if self.response_format is None else self.response_format.constraint()


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`. One token is one byte."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_tokens": 64},
                {"prompt": [254, 72, 105], "max_tokens": 32, "temperature": 0, "logprobs": 3, "stop_token_ids": [10]},
                {
                    "prompt": ["One", "Two"],
                    "n": 2,
                    "seed": 7,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            ]
        }
    )

    prompt: Any = Field(
        description="A text, a list of texts, a list of bytes (0–255, taken verbatim), or a list of such lists.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {**_BYTE_IDS, "minItems": 1},
                {"type": "array", "items": {**_BYTE_IDS, "minItems": 1}, "minItems": 1},
            ]
        },
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31, description="Bytes to complete at most; 16 where omitted.")
    best_of: int | None = Field(
        None, ge=1, le=MAX_N, description="Choices drawn per prompt, of which the `n` most probable are given."
    )
    logprobs: int | None = Field(None, ge=0, le=256, description="Most probable bytes listed beside each byte's own.")
    echo: bool = Field(False, description="Put the prompt before the completion.")
    add_special_tokens: bool = Field(True, description="Prepend BOS (byte 254) to a prompt that is text.")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: Any) -> list[Prompt]:
        return prompts(value, "prompt")

    @model_validator(mode="after")
    def _best_of(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise wrong("best_of", f"must be at least n ({self.n})")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise wrong("best_of", f"more than n ({self.n}) cannot be streamed")
        return self


class SegmentRequest(StrictModel):
    """The body of `POST /v1/segment`."""

    model: str | None = None
    input: Any = Field(
        description="A text (BOS is prepended and is offset 0), or a list of bytes (0–255, taken verbatim).",
        json_schema_extra={"anyOf": [{"type": "string"}, {**_BYTE_IDS, "minItems": 1}]},
    )

    @field_validator("input")
    @classmethod
    def _input(cls, value: Any) -> Prompt:
        if isinstance(value, list) and value and not isinstance(value[0], int):
            raise invalid_value("must be a string or a list of byte ids")
        return prompts(value, "input")[0]


def prompts(value: Any, name: str) -> list[Prompt]:
    """A prompt in any of its four forms → one text or byte string each."""
    if isinstance(value, str):
        utf8(value)
        return [value]
    if not isinstance(value, list):
        raise invalid_value("must be a string, a list of strings, a list of byte ids or a list of such lists")
    if not value:
        raise invalid_value("must not be empty")
    if isinstance(value[0], str):
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise invalid_value(f"[{index}] is not a string like the items before it")
            utf8(item, f"[{index}] ")
        return list(value)
    if isinstance(value[0], list):
        return [byte_ids(item, f"[{index}]") for index, item in enumerate(value)]
    return [byte_ids(value, "")]


def _strings(values: list[str], most: int) -> list[bytes]:
    if len(values) > most:
        raise invalid_value(f"has {len(values)} strings; at most {most} are allowed")
    encoded = [utf8(item) for item in values]
    if not all(encoded):
        raise invalid_value("must not contain an empty string")
    if max(map(len, encoded), default=0) > MAX_STOP_BYTES:
        raise invalid_value(f"has a string of more than {MAX_STOP_BYTES} bytes")
    return encoded


def byte_ids(value: Any, where: str) -> bytes:
    if not isinstance(value, list):
        raise invalid_value(
            f"{where} is not a list of byte ids like the items before it" if where else "must be a list of byte ids"
        )
    if not value:
        raise invalid_value(f"{where} is an empty list of byte ids".lstrip())
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= 255:
        return bytes(value)
    wrong = next(i for i, item in enumerate(value) if type(item) is not int or not 0 <= item <= 255)
    raise invalid_value(f"{where}[{wrong}] is not a byte id: a whole number from 0 to 255")


# ── from the body of a request to a checked model ───────────────────────────────────────────────

Model = TypeVar("Model", bound=StrictModel)


def parse(body: bytes, model: type[Model]) -> tuple[Model, list[str]]:
    """A JSON body → the checked request and the names in it that nobody knows.

    Raises ApiError (400) that names the first parameter at fault.
    """
    document = _json(body)
    if not isinstance(document, dict):
        raise invalid("The request body must be a JSON object.")
    if issubclass(model, GenerationRequest):
        _refuse_unsupported(document, model)
    try:
        request = model.model_validate(document)
    except ValidationError as error:
        raise _explain(error) from None
    return request, _unknown(document, model)


def request_body(model: type[StrictModel]) -> dict[str, Any]:
    """What the OpenAPI document says of a route that takes a model's JSON as its body; definitions are put in place,
    and what may be left out may be null."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def placed(part: Any) -> Any:
        if isinstance(part, list):
            return [placed(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return {
                **placed(definitions[part["$ref"].rpartition("/")[2]]),
                **{k: v for k, v in part.items() if k != "$ref"},
            }
        whole = {key: placed(value) for key, value in part.items()}
        if whole.get("type") == "object" and "properties" in whole:
            required, properties = whole.get("required", ()), whole["properties"]
            whole["properties"] = {
                name: described if name in required else _or_null(described) for name, described in properties.items()
            }
        return whole

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": placed(schema)}}}}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = schema.get("anyOf")
    if kinds is not None:
        return schema if _NULL in kinds else {**schema, "anyOf": [*kinds, _NULL]}
    about: dict[str, Any] = {
        key: schema[key] for key in ("title", "description", "default", "examples") if key in schema
    }
    return {**about, "anyOf": [{key: value for key, value in schema.items() if key not in about}, _NULL]}


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


def _refuse_unsupported(document: Mapping[str, Any], model: type[GenerationRequest]) -> None:
    for name, rule in model.unsupported.items():
        value = document.get(name)
        if value is not None and not rule.harmless(value):
            raise unsupported(name, f"{name}: {rule.why}")


def _unknown(document: Mapping[str, Any], model: type[StrictModel]) -> list[str]:
    if not issubclass(model, GenerationRequest):
        return [name for name in document if name not in model.model_fields]
    names = [name for name in document if name not in model.model_fields and name not in model.unsupported]
    for name, inner in _NESTED.items():
        if isinstance(given := document.get(name), dict):
            known = {field.alias or key for key, field in inner.model_fields.items()}
            names += [f"{name}.{key}" for key in given if key not in known]
    return names


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "parameter":  # an error between fields names its own
        return invalid(first["msg"], first["ctx"]["name"])
    if first["type"] == "missing":
        return invalid(f"{param}: is required", param)
    text = first["msg"]
    return invalid(f"{param}{'' if text.startswith('[') else ': '}{text[:1].lower()}{text[1:]}", param)
