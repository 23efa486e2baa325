"""The table in docs/api.md beside OpenAI and vLLM: true of the code, whole, and true of OpenAI's own client."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import ROOT
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from server.chat import ChatRequest
from server.schemas import CompletionRequest, GenerationRequest, StreamOptions
from server.strict_model import StrictModel
from server.structured import StructuredOutputs

NESTED: dict[str, type[StrictModel]] = {"stream_options": StreamOptions, "structured_outputs": StructuredOutputs}
REFUSED = {"stream_options.include_obfuscation": True, "structured_outputs.structural_tag": {}}
ROUTES = {"completions": CompletionRequest, "chat": ChatRequest}


def table() -> dict[str, dict[str, str]]:
    """Parameter → column → cell; no parameter is there twice."""
    _, _, text = (ROOT / "docs/api.md").read_text(encoding="utf-8").partition("\n## Beside OpenAI and vLLM\n")
    header, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        for name in re.findall(r"`([a-z0-9_.]+)`", line[0]):
            assert name not in rows
            rows[name] = dict(zip(header, line, strict=True))
    return rows


TABLE = table()


def known(model: type[GenerationRequest]) -> set[str]:
    """All names that a route honours or refuses, those inside objects with a dot."""
    inner = {
        f"{name}.{field.alias or key}" for name, part in NESTED.items() for key, field in part.model_fields.items()
    }
    return (set(model.model_fields) | set(model.unsupported) | inner) - set(NESTED)


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_route_honours_and_what_it_refuses_is_what_the_table_says(route: str) -> None:
    model = ROUTES[route]
    refused = set(model.unsupported) | set(REFUSED)
    assert not set(model.unsupported) & set(model.model_fields)
    assert {name for name, row in TABLE.items() if row[route] == "400"} == refused
    assert {name for name, row in TABLE.items() if row[route] == "yes"} == known(model) - refused
    assert {row[route] for row in TABLE.values()} == {"yes", "400", "—"}


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_what_is_refused_inside_an_object_is_a_400(http: Any, name: str, value: Any) -> None:
    outer, _, inner = name.partition(".")
    answer = http.post("/v1/completions", json={"prompt": "x", "stream": True, outer: {inner: value}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def parameters(module: Any) -> set[str]:
    """What OpenAI's client knows of a route."""
    return {"stream", *module.CompletionCreateParamsBase.__annotations__}


def test_every_parameter_of_openais_client_is_in_the_table() -> None:
    completions, chat = parameters(completion_create_params), parameters(chat_create_params)
    assert {"prompt", "best_of"} <= completions
    assert {"messages", "verbosity"} <= chat
    for names, cells in ((completions, ("both", "completions")), (chat, ("both", "chat"))):
        told = {name.partition(".")[0] for name, row in TABLE.items() if row["OpenAI"] in cells}
        assert told == names
