"""`/openapi.json` on chats, scores and tokens: what it says is what the server takes and gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from answers import events
from pydantic import BaseModel

from server.chat_shapes import ChatAnswer, ChatChunk
from server.score import ScoreAnswer
from server.tokenization import DetokenizeAnswer, TokenizeAnswer

ROUTES = ["/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> Any:
    return http.get("/openapi.json").json()


def bodies(document: Any, route: str) -> list[Any]:
    schema = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema.get("anyOf", [schema])  # type: ignore[no-any-return]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "$ref")
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(item)


@pytest.mark.parametrize("route", ROUTES)
def test_the_examples_of_a_route_are_answered(http: httpx.Client, document: Any, route: str) -> None:
    examples = [example for body in bodies(document, route) for example in body["examples"]]
    assert examples
    for example in examples:
        assert http.post(route, json=example).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_a_schema_refers_to_nothing_outside_itself(document: Any, route: str) -> None:
    assert list(references(bodies(document, route))) == []


def test_messages_and_options_are_described_where_they_are(document: Any) -> None:
    (chat,) = bodies(document, "/v1/chat/completions")
    assert {"messages", "max_completion_tokens", "temperature", "stop", "return_chunks"} <= set(chat["properties"])
    assert chat["required"] == ["messages"]
    assert {"role", "content"} <= set(chat["properties"]["messages"]["items"]["properties"])
    good = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(good) == {"application/json", "text/event-stream"}


CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "ab"}],
    "max_tokens": 9,
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "return_token_ids": True,
    "return_chunks": True,
}
FAILS = {"messages": [{"role": "user", "content": "!nan"}]}


@pytest.mark.parametrize(
    ("route", "body", "shape"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"]}, ChatAnswer),
        ("/v1/chat/completions", {**CHAT, "prompt_logprobs": 1}, ChatAnswer),
        ("/v1/chat/completions", FAILS, ChatAnswer),
        ("/v1/score", {"input": "ab"}, ScoreAnswer),
        ("/v1/score", {"input": ""}, ScoreAnswer),
        ("/tokenize", {"prompt": "ab", "return_token_strs": True}, TokenizeAnswer),
        ("/tokenize", {"messages": CHAT["messages"]}, TokenizeAnswer),
        ("/detokenize", {"tokens": []}, DetokenizeAnswer),
    ],
)
def test_an_answer_is_what_the_document_says(
    http: httpx.Client, document: Any, route: str, body: dict[str, Any], shape: type[BaseModel]
) -> None:
    answer = http.post(route, json=body)
    shape.model_validate_json(answer.content)
    described = document["paths"][route]["post"]["responses"]
    reference = described["200"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == f"#/components/schemas/{shape.__name__}"
    assert {"400", "429", "503"} <= set(described)


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
@pytest.mark.parametrize("body", [CHAT, FAILS])
def test_so_is_every_event_of_a_chat(http: httpx.Client, body: dict[str, Any], options: Any) -> None:
    answer = http.post("/v1/chat/completions", json={**body, "stream": True, "stream_options": options})
    for event in events(answer.text):
        ChatChunk.model_validate_json(msgspec.json.encode(event))
