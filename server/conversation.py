"""The messages of a chat: checked field by field, and turned into the bytes that a model goes on with.

Knows the shapes that `/v1/chat/completions` and `/tokenize` share; what an answer looks like is theirs.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from hnet_runtime.config import BOS
from server import errors
from server.chat_templates import RESERVED, ChatTemplate, ChatTemplateBusy, ChatTemplateError, Rendered
from server.strict_model import StrictModel, invalid_value, utf8, wrong

MAX_MESSAGES = 4096
MAX_NAME = 64
RETRY_AFTER = 10  # seconds


class Message(StrictModel):
    """One message. Names that are not known are remembered and not shown to the template."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        frozen=True,
        json_schema_extra={
            "anyOf": [
                {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]},
                {"properties": {"tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
            ]
        },
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = Field(
        None,
        description="A text, or a list of parts of type text, which are joined by line feeds.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
                {"type": "null"},
            ]
        },
    )
    name: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    tool_call_id: str | None = Field(None, max_length=256)
    tool_calls: list[dict[str, Any]] | None = Field(None, description="Of an assistant; shown to a Jinja template.")

    @field_validator("content")
    @classmethod
    def _content(cls, value: Any) -> str:
        if isinstance(value, str):
            utf8(value)
            return value
        if not isinstance(value, list):
            raise invalid_value("must be a string or a list of text parts")
        if not value:
            raise invalid_value("must not be empty")
        return "\n".join(_part(item, f"[{index}]") for index, item in enumerate(value))

    @field_validator("name", "tool_call_id")
    @classmethod
    def _text(cls, value: str) -> str:
        utf8(value)
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise invalid_value("has no content")
        return self

    @property
    def extras(self) -> list[str]:
        """Names that nobody knows."""
        return list(self.model_extra or ())

    def shown(self) -> dict[str, Any]:
        """What a template sees."""
        fields = {name: getattr(self, name) for name in ("name", "tool_call_id", "tool_calls")}
        given = {name: value for name, value in fields.items() if value is not None}
        return {"role": self.role, "content": self.content or "", **given}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise invalid_value(f"{where} is not a part: an object with a type")
    if part["type"] != "text":
        raise invalid_value(f"{where} is of type {ascii(part['type'])[:64]}, which is not supported; only text is")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid_value(f"{where}.text is not a string")
    utf8(text, f"{where}.text ")
    return text


class Conversation(StrictModel):
    """What requests with `messages` share."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = Field(True, description="End the prompt where an answer begins.")
    continue_final_message: bool = Field(False, description="End the prompt where the last message ends.")
    add_special_tokens: bool = Field(True, description="Prepend BOS (byte 254) unless the template does.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for a Jinja template.")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(RESERVED & set(value)):
            raise invalid_value(f"must not hold {name!r}, which the server sets")
        return value

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise wrong("continue_final_message", "not allowed when add_generation_prompt is true")
            if self.messages[-1].content is None:
                raise wrong("continue_final_message", "the last message has no content to go on from")
        return self

    def ignored(self, template: ChatTemplate) -> list[str]:
        """Names inside messages that nobody knows, and variables that the template has no use for."""
        names = [f"messages[{index}].{name}" for index, item in enumerate(self.messages) for name in item.extras]
        if not template.takes_variables:
            names += [f"chat_template_kwargs.{name}" for name in self.chat_template_kwargs or ()]
        return names

    async def render(self, template: ChatTemplate) -> Rendered:
        """The prompt's bytes, BOS included, and what ends the completion. Raises ApiError (400, 429)."""
        try:
            rendered = await template.render(
                [message.shown() for message in self.messages],
                generate=self.add_generation_prompt and not self.continue_final_message,
                resume=self.continue_final_message,
                variables=self.chat_template_kwargs or {},
            )
        except ChatTemplateError as error:
            raise errors.invalid(f"messages: the chat template: {error}", "messages", "chat_template_error") from None
        except ChatTemplateBusy:
            raise errors.slow_down(RETRY_AFTER) from None
        bos = bytes((BOS,))
        if self.add_special_tokens and not rendered.data.startswith(bos):
            rendered = Rendered(bos + rendered.data, rendered.stop)
        return rendered
