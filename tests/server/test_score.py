"""`POST /v1/score` on the fake engine, whose log-probability of every byte is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Running
from fake_engine import logprob
from test_routes import error_of

from hnet_runtime.engine.messages import ByteLogprobs
from server.scoring import bits_per_byte, byte_logprobs


def test_every_byte_but_bos_has_its_logprob(http: httpx.Client) -> None:
    answer = http.post("/v1/score", json={"input": "añ"})
    expected = [logprob(byte) for byte in "añ".encode()]
    assert answer.json() == {
        "object": "score",
        "model": "fake",
        "input_bytes": 4,
        "logprobs": [None, *expected],
        "bits_per_byte": pytest.approx(-sum(expected) / 3 / math.log(2)),
        "usage": {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4},
    }


def test_bytes_are_taken_verbatim_and_may_be_any(http: httpx.Client) -> None:
    answer = http.post("/v1/score", json={"input": list(range(256)), "nobody": 1, "model": "fake"})
    assert answer.json()["logprobs"] == [None, *map(logprob, range(1, 256))]
    assert answer.headers["x-ignored-params"] == "nobody"


@pytest.mark.parametrize("text", ["", [254]])
def test_what_nothing_precedes_has_no_score(http: httpx.Client, text: Any) -> None:
    answer = http.post("/v1/score", json={"input": text}).json()
    assert (answer["logprobs"], answer["bits_per_byte"]) == ([None], None)


@pytest.mark.parametrize(
    "body",
    [{}, {"input": 5}, {"input": None}, {"input": []}, {"input": ["a"]}, {"input": [256]}],
)
def test_a_wrong_input_is_named(http: httpx.Client, body: dict[str, Any]) -> None:
    assert error_of(http.post("/v1/score", json=body), 400, None)["param"] == "input"


def test_a_lone_surrogate_is_no_text(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/score", content=b'{"input": "\\ud800"}'), 400, None)
    assert "surrogate" in error["message"]


def test_more_than_the_context_is_refused(http: httpx.Client) -> None:
    assert http.post("/v1/score", json={"input": "x" * 511}).status_code == 200
    error = error_of(http.post("/v1/score", json={"input": "x" * 512}), 400, "context_length_exceeded")
    assert error["param"] == "input"
    assert "513 bytes" in error["message"]


def test_an_unknown_model_and_a_wrong_method(http: httpx.Client) -> None:
    error_of(http.post("/v1/score", json={"model": "gpt-4", "input": "x"}), 404, "model_not_found")
    error_of(http.get("/v1/score"), 405, "method_not_allowed")


def test_a_score_is_behind_the_key(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread(settings={"api_key": ["k"]}).client() as client:
        error_of(client.post("/v1/score", json={"input": "x"}), 401, "invalid_api_key")


def test_a_defect_of_the_engine_is_a_500_that_says_why(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/score", json={"input": "x!refuse"}), 500, None)
    assert error["type"] == "server_error"


def test_minus_infinity_is_a_number_in_json() -> None:
    assert byte_logprobs([ByteLogprobs(65, -math.inf), ByteLogprobs(66, -1.0)]) == [-9999.0, -1.0]


def test_a_byte_of_probability_one_half_is_a_bit() -> None:
    assert bits_per_byte([math.log(0.5)] * 7) == pytest.approx(1.0)
    assert bits_per_byte([]) is None
