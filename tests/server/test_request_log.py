from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from answers import wait_for
from conftest import Running

from hnet_runtime.engine.messages import Usage
from server.request_log import log_finished

KEYS = (
    *("request_id", "reason", "prompt_bytes", "completion_bytes", "seconds", "chunks", "cached_bytes", "queue_seconds"),
    *("prefill_seconds", "decode_seconds", "park_seconds", "decode_bytes_per_second", "preemptions"),
)


def took(**changes: Any) -> Usage:
    numbers: dict[str, Any] = {
        "prompt_bytes": 1000,
        "completion_bytes": 30,
        "chunks": (200, 50),
        "queue_seconds": 0.0000123456,
        "prefill_seconds": 0.25,
        "decode_seconds": 0.0024,
        "cached_bytes": 64,
        "park_seconds": 1 / 3,
        "preemptions": 1,
        **changes,
    }
    return Usage(**numbers)


def finish(request_id: str = "cmpl-a-0-0", usage: Usage | None = None) -> None:
    log_finished(request_id, "stop", usage, prompt_bytes=7, completion_bytes=5, seconds=12345.678)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log's lines so far; the logger is `hnet.request`, the level INFO."""
    caplog.set_level(logging.INFO, logger="hnet.request")

    def found() -> list[str]:
        records = [record for record in caplog.records if record.name == "hnet.request"]
        assert all(record.levelno == logging.INFO for record in records)
        return [record.getMessage() for record in records]

    return found


def fields(line: str) -> dict[str, str]:
    """The keys and values of a line none of whose values is quoted."""
    return dict(item.split("=") for item in line.split(" "))


def test_the_line_says_what_a_request_took(lines: Callable[[], list[str]]) -> None:
    finish(usage=took())
    assert lines() == [
        "request_id=cmpl-a-0-0 reason=stop prompt_bytes=1000 completion_bytes=30 seconds=12350 chunks=200,50 "
        "cached_bytes=64 queue_seconds=1.235e-05 prefill_seconds=0.25 decode_seconds=0.0024 park_seconds=0.3333 "
        "decode_bytes_per_second=12500 preemptions=1"
    ]


def test_a_request_that_did_not_decode_has_no_speed(lines: Callable[[], list[str]]) -> None:
    finish(usage=took(completion_bytes=0, decode_seconds=0.0))
    assert fields(lines()[0])["decode_bytes_per_second"] == "0"


def test_without_a_usage_the_servers_own_counts_are_shown(lines: Callable[[], list[str]]) -> None:
    finish()
    assert lines() == ["request_id=cmpl-a-0-0 reason=stop prompt_bytes=7 completion_bytes=5 seconds=12350"]


@pytest.mark.parametrize("name", ["a reason=error", 'a"b', "a\\b", "a=b"])
def test_a_name_forges_no_key(lines: Callable[[], list[str]], name: str) -> None:
    finish(name)
    told, _, rest = lines()[0].removeprefix("request_id=").partition(" reason=stop prompt_bytes=7")
    assert json.loads(told) == name
    assert rest == " completion_bytes=5 seconds=12350"


def test_nothing_is_put_together_for_a_log_nobody_keeps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, logger="hnet.request")
    monkeypatch.setattr("server.request_log._figures", lambda value: pytest.fail("a number was formatted"))
    finish(usage=took())
    assert not caplog.records


def test_every_choice_has_its_line(
    serve_in_thread: Callable[..., Running], lines: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with serve_in_thread(prefix_cache=True).client() as client:
        for number, body in enumerate(
            (
                {"prompt": "secret words", "max_tokens": 12, "cache_salt": "pepper", "n": 2},
                {"prompt": "secret words", "max_tokens": 9, "cache_salt": "pepper", "stream": True},
                {"prompt": "secret !park!preempt", "max_tokens": 6},
                {"prompt": "secret !nan", "temperature": 0},
                {"prompt": "secret !refuse"},
            )
        ):
            client.post("/v1/completions", json=body, headers={"x-request-id": f"r{number}"})
        client.post("/v1/segment", json={"input": "secret"}, headers={"x-request-id": "r5"})
        chat = {"messages": [{"role": "user", "content": "secret"}], "max_tokens": 3}
        named = client.post("/v1/chat/completions", json=chat).json()["id"]
    told = lines()
    first, second, third, fourth, fifth, refused, segment, chatted = map(fields, told)
    for line in (first, second, third, fourth, fifth, segment):
        assert tuple(line) == KEYS
    assert first["request_id"].startswith("cmpl-r0-")
    assert chatted["request_id"].startswith(f"{named}-")
    assert [each["reason"] for each in (first, third, fifth, refused)] == ["length", "length", "error", "error"]
    assert [each["prompt_bytes"] for each in (first, third, refused, segment)] == ["13", "13", "15", "7"]
    assert [each["completion_bytes"] for each in (first, third, fifth, refused)] == ["12", "9", "3", "0"]
    assert [each["cached_bytes"] for each in (first, second, third)] == ["0", "13", "13"]
    assert (first["chunks"], first["queue_seconds"], first["prefill_seconds"]) == ("9,4", "0.001", "0.002")
    assert float(first["decode_bytes_per_second"]) == pytest.approx(12 / float(first["decode_seconds"]), rel=1e-3)
    assert (fourth["park_seconds"], fourth["preemptions"]) == ("2.25", "2")
    assert tuple(refused) == KEYS[:5]
    assert (segment["request_id"][:7], segment["reason"]) == ("seg-r5-", "length")
    for line in told:
        assert "secret" not in line
        assert "pepper" not in line


def test_an_engine_that_fails_leaves_a_line_for_each_of_its_requests(
    serve_in_thread: Callable[..., Running], lines: Callable[[], list[str]]
) -> None:
    with serve_in_thread().client() as client:
        body = {"prompt": ["abc!crash", "de"], "temperature": 0, "max_tokens": 50}
        assert client.post("/v1/completions", json=body).status_code == 500
    told = [fields(line) for line in lines()]
    assert [(line["reason"], line["prompt_bytes"]) for line in told] == [("error", "10"), ("error", "3")]
    assert [tuple(line) for line in told] == [KEYS[:5]] * 2
    assert told[0]["completion_bytes"] == "3"


def test_a_client_that_goes_away_leaves_a_line(
    serve_in_thread: Callable[..., Running], lines: Callable[[], list[str]]
) -> None:
    running = serve_in_thread(tick_seconds=0.005)
    with (
        running.client() as client,
        client.stream("POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 500, "stream": True}) as answer,
    ):
        next(answer.iter_text())
    wait_for(lambda: lines())
    (line,) = lines()
    assert fields(line)["reason"] == "abort"
    assert 0 < int(fields(line)["completion_bytes"]) < 500
