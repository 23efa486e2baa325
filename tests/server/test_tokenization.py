"""`POST /tokenize` and `/detokenize`: one token is one byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running
from test_routes import error_of


def test_a_text_is_bos_and_its_bytes(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "añ", "model": "fake", "nobody": 1})
    assert answer.json() == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [254, *"añ".encode()],
        "token_strs": None,
    }
    assert answer.headers["x-ignored-params"] == "nobody"


def test_bos_can_be_left_out_and_bytes_have_names(http: httpx.Client) -> None:
    body = {"prompt": "a\\ñ", "add_special_tokens": False, "return_token_strs": True}
    answer = http.post("/tokenize", json=body).json()
    assert answer["tokens"] == list("a\\ñ".encode())
    assert answer["token_strs"] == ["a", "\\\\", "\\xc3", "\\xb1"]
    empty = http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()
    assert (empty["count"], empty["tokens"]) == (0, [])


def test_a_text_may_be_longer_than_the_context(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "x" * 100_000}).json()
    assert answer["count"] == len(answer["tokens"]) == 100_001


def test_messages_are_what_the_model_would_read(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = http.post("/tokenize", json=body).json()
    assert bytes(answer["tokens"]) == b"\xfeUser: Hi\n\nAssistant: "
    body |= {"add_generation_prompt": False, "add_special_tokens": False, "return_token_strs": True}
    answer = http.post("/tokenize", json=body).json()
    assert bytes(answer["tokens"]) == b"User: Hi\n\n"
    assert answer["token_strs"][-1] == "\\x0a"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [65]}, "prompt"),
        ({"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert error_of(http.post("/tokenize", json=body), 400, None)["param"] == param


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": ', b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_400(http: httpx.Client, body: bytes) -> None:
    assert http.post("/tokenize", content=body).status_code == 400
    assert http.post("/detokenize", content=body).status_code == 400


def test_a_lone_surrogate_is_no_text(http: httpx.Client) -> None:
    error = error_of(http.post("/tokenize", content=b'{"prompt": "\\ud800"}'), 400, None)
    assert error["param"] == "prompt"
    messages = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    error = error_of(http.post("/tokenize", content=messages), 400, None)
    assert error["param"] == "messages.0.content"


@pytest.mark.parametrize("text", ["", "abc", "añ日🙂", "\ufeffa\x00b", "\ue000"])
def test_a_text_comes_back(http: httpx.Client, text: str) -> None:
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_any_bytes_have_a_text(http: httpx.Client) -> None:
    tokens = list(range(256)) * 2
    answer = http.post("/detokenize", json={"tokens": tokens, "nobody": 1})
    assert answer.json()["prompt"] == bytes(tokens).decode("utf-8", "replace")
    assert answer.headers["x-ignored-params"] == "nobody"


@pytest.mark.parametrize("tokens", [None, "abc", 5, [256], [-1], [65.0], [True], [[65]], ["a"]])
def test_what_is_no_byte_is_named(http: httpx.Client, tokens: Any) -> None:
    assert error_of(http.post("/detokenize", json={"tokens": tokens}), 400, None)["param"] == "tokens"


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})])
def test_both_know_the_model_the_method_and_the_key(
    http: httpx.Client, serve_in_thread: Callable[..., Running], path: str, body: dict[str, Any]
) -> None:
    error_of(http.post(path, json={**body, "model": "gpt-4"}), 404, "model_not_found")
    error_of(http.get(path), 405, "method_not_allowed")
    with serve_in_thread(settings={"api_key": ["k"]}).client() as client:
        error_of(client.post(path, json=body), 401, "invalid_api_key")
        assert client.post(path, json=body, headers={"authorization": "Bearer k"}).status_code == 200
