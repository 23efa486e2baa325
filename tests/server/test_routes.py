from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from answers import wait_for
from conftest import Running

import hnet_runtime
from server.completions import CompletionJob


def error_of(answer: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/models/", "/v1/completions/", "/v1//completions"])
def test_an_unknown_route_is_a_404_in_one_shape(http: httpx.Client, path: str) -> None:
    code = "model_not_found" if path == "/v1/models/" else "unknown_url"
    error_of(http.get(path), 404, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("DELETE", "/v1/segment", "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
        ("POST", "/metrics", "GET"),
    ],
)
def test_a_wrong_method_is_a_405_that_says_which_are_right(
    http: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)
    error_of(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


def test_models_lists_the_one_that_is_served(http: httpx.Client) -> None:
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 512)
    assert [stage["parameters"] for stage in card["hnet"]["stages"]] == [10, 20, 30]
    assert [card["hnet"][name] for name in ("device", "dtype", "kernels")] == ["cpu", "float32", "torch"]
    assert http.get("/v1/models/fake").json() == card


@pytest.mark.parametrize("name", ["gpt-4", "fake/", "Fake", "some/model"])
def test_an_unknown_model_is_a_404(http: httpx.Client, name: str) -> None:
    assert error_of(http.get(f"/v1/models/{name}"), 404, "model_not_found")["param"] == "model"
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/segment", {"input": "x"})):
        error_of(http.post(path, json={"model": name, **body}), 404, "model_not_found")


def test_a_request_may_name_the_model_or_not(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "x", "model": "fake"}).status_code == 200
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_segment_lists_boundaries_stage_by_stage(http: httpx.Client) -> None:
    answer = http.post("/v1/segment", json={"input": "abcdefgh"}).json()
    assert answer == {
        "object": "segmentation",
        "model": "fake",
        "input_bytes": 9,
        "stages": [
            {"stage": 1, "boundaries": [0, 3, 6], "probabilities": [1.0, 0.75, 0.75], "bytes_per_chunk": 3.0},
            {"stage": 2, "boundaries": [0, 7], "probabilities": [1.0, 0.75], "bytes_per_chunk": 4.5},
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9},
    }
    verbatim = http.post("/v1/segment", json={"input": list(b"abcdefgh"), "unknown": 1})
    assert verbatim.json()["input_bytes"] == 8
    assert verbatim.headers["x-ignored-params"] == "unknown"


def test_probes_and_version_answer(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json() == {"version": hnet_runtime.__version__}


def test_the_openapi_document_describes_the_requests(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "utf8", "return_chunks", "logprobs"} <= set(schema["properties"])
    assert http.get("/docs").status_code == 200
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]


# ── request ids ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/models/nothing"])
def test_a_request_id_is_echoed_on_every_answer_errors_included(http: httpx.Client, path: str) -> None:
    assert http.get(path, headers={"x-request-id": "abc 123"}).headers["x-request-id"] == "abc 123"


@pytest.mark.parametrize("value", [b"", b"x" * 129, b"caf\xc3\xa9", b"a\tb"])
def test_a_request_id_that_is_none_is_replaced(http: httpx.Client, value: bytes) -> None:
    made = http.get("/health", headers={b"x-request-id": value}).headers["x-request-id"]
    assert made.encode() != value
    assert len(made) == 32


def test_request_ids_that_are_made_differ(http: httpx.Client) -> None:
    assert len({http.get("/health").headers["x-request-id"] for _ in range(10)}) == 10


def test_a_completion_is_named_by_its_request_id_and_logged_with_it(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hnet.access"):
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "named"})
        wait_for(lambda: any("POST /v1/completions 200" in line and "id=named" in line for line in caplog.messages))
    assert answer.json()["id"] == "cmpl-named"


def test_a_defect_is_a_500_in_the_same_shape_and_logged(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: CompletionJob, stream: object) -> object:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(CompletionJob, "whole", broken)
    answer = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "broken-one"})
    error = error_of(answer, 500, "internal_error")
    assert "broken-one" in error["message"]
    assert "a defect" not in answer.text
    assert answer.headers["x-request-id"] == "broken-one"
    wait_for(lambda: any("broken-one" in record.getMessage() and record.exc_info for record in caplog.records))


async def test_a_client_that_leaves_while_sending_is_no_defect(
    shared: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _, writer = await asyncio.open_connection("127.0.0.1", int(shared.url.rpartition(":")[2]))
        writer.write(
            b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nx-request-id: left\r\n\r\n{"pr'
        )
        await writer.drain()
        writer.close()
        await asyncio.to_thread(wait_for, lambda: any("499" in line and "id=left" in line for line in caplog.messages))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_defect_in_a_stream_is_an_event_and_the_stream_ends(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: CompletionJob, choice: object) -> bytes:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(CompletionJob, "_event", broken)
    answer = http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"code": "internal_error"' in answer.text
    wait_for(lambda: any(record.exc_info for record in caplog.records))


# ── size and key ────────────────────────────────────────────────────────────────────────────────


def test_a_body_too_large_is_a_413_announced_or_not(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread(settings={"max_body_bytes": 1000})

    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 1000
        yield b'"}'

    with running.client() as client:
        error_of(client.post("/v1/completions", json={"prompt": "x" * 1000}), 413, "body_too_large")
        error_of(client.post("/v1/completions", json={"prompt": "x" * 5_000_000}), 413, "body_too_large")
        error_of(client.post("/v1/completions", content=pieces()), 413, "body_too_large")
        assert client.post("/v1/completions", json={"prompt": "x" * 400}).status_code == 200


def test_everything_but_the_probes_asks_for_the_key(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread(settings={"api_key": ["sécret"]}).client() as client:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/docs", "/nothing"):
            answer = client.get(path)
            error_of(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        error_of(client.post("/v1/completions", json={"prompt": "x"}), 401, "invalid_api_key")
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 200
        for wrong in ("Bearer secret", "sécret", "Basic sécret", "Bearer", "Bearer sécret2", "Bearer sécre"):
            error_of(client.get("/v1/models", headers={"authorization": wrong.encode()}), 401, "invalid_api_key")
        for right in ("Bearer sécret", "bearer sécret"):
            assert client.get("/v1/models", headers={"authorization": right.encode()}).status_code == 200


def test_metrics_may_be_public(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread(settings={"api_key": ["k"], "metrics_public": True}).client() as client:
        assert client.get("/metrics").status_code == 200
        error_of(client.get("/v1/models"), 401, "invalid_api_key")


def test_the_served_name_is_the_one_that_counts(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread(settings={"served_model_name": "mine"}).client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        assert client.post("/v1/completions", json={"prompt": "x", "model": "mine"}).json()["model"] == "mine"
        error_of(client.post("/v1/completions", json={"prompt": "x", "model": "fake"}), 404, "model_not_found")


def test_a_full_queue_is_a_429_that_says_when_to_come_back(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread(settings={"max_waiting_requests": 2}, max_num_seqs=1, tick_seconds=0.01)
    with running.client() as client:
        error_of(client.post("/v1/completions", json={"prompt": "x", "n": 4}), 429, "slow_down")
        with client.stream("POST", "/v1/completions", json={"prompt": "x", "n": 3, "stream": True}):
            answer = client.post("/v1/completions", json={"prompt": "x"})
            error = error_of(answer, 429, "slow_down")
            assert error["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert 'hnet_admission_rejections_total{reason="slow_down"} 2.0' in client.get("/metrics").text
