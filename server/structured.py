"""Structured output: what a request says a completion has to be, checked and made ready for the engine.

Knows OpenAI's `response_format`, vLLM's `structured_outputs`, and `Constraint`, which both come to. What is asked for
is compiled in a process of its own first (`server.constraint_worker`), so that whatever cannot be enforced is an error
that names it, and what would take too long costs nobody else anything.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, Literal, Self

import msgspec
from pydantic import Field, model_validator

from hnet_runtime.engine.messages import MAX_CONSTRAINT_BYTES, Constraint
from server.errors import invalid, slow_down
from server.limited_process import LimitedProcess, ProcessEnded, TookTooLong
from server.strict_model import StrictModel, wrong

COMPILE_SECONDS = 1.0
QUEUE_SECONDS = 5.0  # that a request waits for others' constraints to be compiled
VERDICTS = 512  # remembered
MAX_CHOICES = 1024
WHITESPACE = r" ?|\n[ \t]{0,32}"  # between the parts of JSON, where nothing else is asked for

_ANY_OBJECT = '{"type": "object"}'
_WAYS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(StrictModel):
    """vLLM's way to say what a completion has to be: exactly one of the first five."""

    json_: Any = Field(
        None,
        alias="json",
        description="A JSON schema, or its text.",
        json_schema_extra={"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]},
    )
    regex: str | None = Field(None, description="A regular expression for the whole completion.")
    choice: list[str] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="Texts, one of which comes."
    )
    grammar: str | None = Field(None, description="A grammar in Lark's or in GBNF's notation.")
    json_object: bool = Field(False, description="Any JSON object.")
    whitespace_pattern: str | None = Field(None, description="What may stand between the parts of JSON.")
    disable_any_whitespace: bool = Field(False, description="Nothing stands between the parts of JSON.")
    disable_additional_properties: bool = Field(
        False, description="Objects have only the properties that they name, unless they say so."
    )
    structural_tag: Any = Field(None, description="Not supported.", json_schema_extra={"type": "null"})

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.structural_tag is not None:
            raise wrong("structured_outputs.structural_tag", "is not supported")
        if len(self.ways) != 1:
            named = " and ".join(self.ways) or "none"
            raise wrong("structured_outputs", f"must have exactly one of {', '.join(_WAYS)}, not {named}")
        return self

    @property
    def ways(self) -> list[str]:
        values = (self.json_ is not None, self.regex is not None, self.choice is not None, self.grammar is not None)
        return [way for way, is_given in zip(_WAYS, (*values, self.json_object), strict=True) if is_given]

    def constraint(self) -> tuple[Constraint, str]:
        """And the name of the parameter that says it. Raises ApiError (400)."""
        way = self.ways[0]
        name = f"structured_outputs.{way}"
        if self.regex is not None:
            return Constraint(kind="regex", source=self.regex), name
        if self.choice is not None:
            return Constraint(kind="choice", source=_compact(self.choice, name)), name
        if self.grammar is not None:
            return Constraint(kind="grammar", source=self.grammar), name
        schema = _ANY_OBJECT if self.json_object else self.json_
        whitespace = "" if self.disable_any_whitespace else (self.whitespace_pattern or WHITESPACE)
        return Constraint(
            kind="json",
            source=schema if isinstance(schema, str) else _compact(schema, name),
            whitespace=whitespace,
            closed=self.disable_additional_properties,
        ), name


class JsonSchemaFormat(StrictModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="A JSON schema.")
    strict: bool = Field(False, description="Output always follows the schema, whatever this says.")


class ResponseFormat(StrictModel):
    """OpenAI's way to say what a completion has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema(self) -> Self:
        is_asked = self.type == "json_schema"
        if is_asked and (self.json_schema is None or self.json_schema.schema_ is None):
            raise wrong("response_format.json_schema.schema", "is required for type json_schema")
        if not is_asked and self.json_schema is not None:
            raise wrong("response_format.json_schema", f"is not allowed for type {self.type}")
        return self

    def constraint(self) -> tuple[Constraint, str] | None:
        """And the name of the parameter that says it; None for any text. Raises ApiError (400)."""
        if self.json_schema is not None:
            name = "response_format.json_schema.schema"
            source = _compact(self.json_schema.schema_, name)
        elif self.type == "json_object":
            name, source = "response_format", _ANY_OBJECT
        else:
            return None
        return Constraint(kind="json", source=source, whitespace=WHITESPACE), name


def _compact(document: Any, name: str) -> str:
    try:
        return msgspec.json.encode(document).decode()
    except (UnicodeEncodeError, ValueError):
        raise invalid(f"{name}: has a lone surrogate, which no text can contain", name) from None


class ConstraintChecker:
    """Says whether constraints can be enforced, and remembers it."""

    def __init__(self) -> None:
        self._worker = LimitedProcess("server.constraint_worker", None)
        self._turn = asyncio.Semaphore(1)
        self._verdicts: OrderedDict[Constraint, str] = OrderedDict()  # what is wrong with each, if anything

    async def check(self, constraint: Constraint, name: str) -> None:
        """Raises ApiError: 400, naming what cannot be enforced; 429 where too many others wait."""
        if len(constraint.source.encode("utf-8", "replace")) > MAX_CONSTRAINT_BYTES:
            raise invalid(f"{name}: has more than {MAX_CONSTRAINT_BYTES} bytes", name)
        verdict = self._verdicts.get(constraint)
        if verdict is None:
            try:
                await asyncio.wait_for(self._turn.acquire(), QUEUE_SECONDS)
            except TimeoutError:
                raise slow_down(int(QUEUE_SECONDS)) from None
            try:
                verdict = self._verdicts.get(constraint)
                if verdict is None:
                    verdict = self._verdicts[constraint] = await asyncio.to_thread(self._ask, constraint)
            finally:
                self._turn.release()
        self._verdicts.move_to_end(constraint)
        while len(self._verdicts) > VERDICTS:
            self._verdicts.popitem(last=False)
        if verdict:
            raise invalid(f"{name}: {verdict}", name)

    def _ask(self, constraint: Constraint) -> str:
        try:
            answer = self._worker.ask(msgspec.to_builtins(constraint), COMPILE_SECONDS)
        except TookTooLong:
            return f"took more than {COMPILE_SECONDS:g} s to compile"
        except ProcessEnded:
            return "takes too much memory or time to compile"
        return str(answer.get("error", ""))

    def close(self) -> None:
        self._worker.close()
