"""The OpenAPI document: whole in itself, and true of what is asked and answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from answers import events

from server.responses import CompletionAnswer, ErrorAnswer
from server.schemas import CompletionRequest, GenerationRequest, parse


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    return http.get("/openapi.json").json()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def schema(document: dict[str, Any]) -> dict[str, Any]:
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["required"]
    return body["content"]["application/json"]["schema"]  # type: ignore[no-any-return]


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_reference_in_a_completions_part_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    found = list(references(document["paths"]["/v1/completions"]))
    assert found
    for reference in found:
        place: Any = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


def test_the_schema_names_every_parameter_that_is_taken_and_says_what_it_is(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    assert schema["required"] == ["prompt"]
    assert set(GenerationRequest.model_fields) < set(schema["properties"])
    for name, described in schema["properties"].items():
        assert "type" in described or "anyOf" in described or "enum" in described or "properties" in described, name


def test_a_definition_is_put_in_its_place(schema: dict[str, Any]) -> None:
    options = schema["properties"]["stream_options"]["anyOf"][0]
    assert set(options["properties"]) == {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    assert not list(references(schema))


def test_the_examples_are_taken_as_they_are(http: httpx.Client, schema: dict[str, Any]) -> None:
    assert len(schema["examples"]) >= 2
    for example in schema["examples"]:
        assert http.post("/v1/completions", json=example).status_code == 200
    for name, described in schema["properties"].items():
        for example in described.get("examples", ()):
            parse(msgspec.json.encode({"prompt": "x", name: example}), CompletionRequest)


def test_a_default_is_one_that_may_be_said(schema: dict[str, Any]) -> None:
    defaults = {name for name, described in schema["properties"].items() if "default" in described}
    assert {"n", "temperature", "utf8", "presence_penalty"} <= defaults
    for name, described in schema["properties"].items():
        if name in defaults:
            request, _ = parse(msgspec.json.encode({"prompt": "x", name: described["default"]}), CompletionRequest)
            assert getattr(request, name) == getattr(parse(b'{"prompt": "x"}', CompletionRequest)[0], name)


EVERYTHING: dict[str, Any] = {
    "prompt": ["abc", "b!nan"],
    "n": 2,
    "logprobs": 2,
    "echo": True,
    "return_token_ids": True,
    "return_chunks": True,
    "max_tokens": 6,
    "stop": "zz",
}


@pytest.mark.parametrize("body", [{"prompt": "a"}, EVERYTHING, {**EVERYTHING, "prompt_logprobs": 1, "best_of": 3}])
def test_an_answer_is_what_the_document_says(http: httpx.Client, body: dict[str, Any]) -> None:
    CompletionAnswer.model_validate_json(http.post("/v1/completions", json=body).content)


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_so_is_every_event_of_a_stream(http: httpx.Client, options: dict[str, Any] | None) -> None:
    answer = http.post("/v1/completions", json={**EVERYTHING, "stream": True, "stream_options": options})
    for event in events(answer.text):
        CompletionAnswer.model_validate_json(msgspec.json.encode(event))


@pytest.mark.parametrize(
    "body", [b"{", b'{"prompt": 5}', b'{"prompt": "x", "suffix": "y"}', b'{"prompt": "", "model": "z"}']
)
def test_so_is_an_error(http: httpx.Client, document: dict[str, Any], body: bytes) -> None:
    answer = http.post("/v1/completions", content=body)
    assert str(answer.status_code) in document["paths"]["/v1/completions"]["post"]["responses"]
    ErrorAnswer.model_validate_json(answer.content)
