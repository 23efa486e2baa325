"""What bounds a request and what is turned away: time, and prompts that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from answers import events, expected, samples, wait_for
from conftest import Running
from test_engine_client import INFO, Wire, gain, submit

from hnet_runtime.engine.messages import Abort, EngineStats, Request, SamplingParams, Tick
from server.admission import Admission, Backlog
from server.engine_client import EngineClient
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import ServerSettings


def test_a_stream_that_outlasts_its_time_ends_with_what_it_has_and_an_error(
    serve_in_thread: Callable[..., Running],
) -> None:
    running = serve_in_thread(settings={"request_timeout": 1.0}, tick_seconds=0.02)
    with running.client() as client:
        body = {"prompt": "abc", "max_tokens": 500, "n": 2, "seed": 0, "temperature": 0, "stream": True}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        *pieces, last = events(answer.text)
        assert last["error"]["code"] == "request_timeout"
        text = "".join(event["choices"][0]["text"] for event in pieces if event["choices"][0]["index"] == 0)
        assert 3 <= len(text) < 500
        assert text.encode() == expected(b"abc", len(text))
        wait_for(lambda: samples(client.get("/metrics").text)["hnet_num_requests_running"] == 0)
        finished = samples(client.get("/metrics").text)
        assert finished['hnet_request_finished_total{reason="abort"}'] == 2


def test_an_answer_that_outlasts_its_time_is_a_504_that_clients_do_not_repeat(
    serve_in_thread: Callable[..., Running],
) -> None:
    running = serve_in_thread(settings={"request_timeout": 1.5}, tick_seconds=0.02)
    with running.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 500})
        assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("server_error", None, "request_timeout")
        assert "1.5 s" in error["message"]
        assert client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3}).status_code == 200


async def test_a_request_that_ended_in_time_is_not_aborted_later() -> None:
    wire = Wire()
    client = EngineClient(wire, Metrics(Backlog()), request_timeout=0.02)
    client.start()
    wire.say(INFO)
    done, late = submit(client, "a"), submit(client, "b")
    wire.say(gain("a", b"x", finish_reason="stop"))
    await asyncio.sleep(0.05)
    assert [output.data for output in await done.take()] == [b"x"]
    assert await done.take() == []
    with pytest.raises(ApiError, match=r"within 0\.02 s"):
        await late.take()
    assert [message for message in wire.sent if isinstance(message, Abort)] == [Abort(request_id="b")]
    await client.stop()


async def test_prompts_that_wait_are_bounded_in_bytes_and_the_wait_is_what_reading_takes() -> None:
    backlog, wire = Backlog(), Wire()
    client = EngineClient(wire, Metrics(backlog))
    admission = Admission(client, backlog, ServerSettings(max_waiting_bytes=1000))
    client.start()
    wire.say(INFO)
    backlog._reading._since -= 1.0
    wire.say(Tick(stats=EngineStats(prompt_bytes_total=100)))  # a hundred bytes a second
    admission.check()
    many = [SamplingParams(choice=choice) for choice in range(50)]
    client.submit(*(Request(request_id=f"a{params.choice}", prompt=b"x" * 400, params=params) for params in many))
    assert backlog.unread == 400  # the choices of a prompt read it once
    admission = Admission(client, backlog, ServerSettings(max_waiting_bytes=1000, max_waiting_requests=10**6))
    admission.check()
    client.submit(Request(request_id="b", prompt=b"y" * 5000))  # longer than the limit, and let in while there is room
    with pytest.raises(ApiError) as caught:
        admission.check()
    assert (caught.value.status, caught.value.code) == (503, "server_is_overloaded")
    assert int(caught.value.headers["retry-after"]) == pytest.approx(44, abs=2)
    assert int(caught.value.headers["retry-after-ms"]) == pytest.approx(44_000, abs=2000)
    assert admission.rejections == {"server_is_overloaded": 1}
    wire.say(gain("b", b"z"))
    admission.check()
    await client.stop()


@pytest.mark.parametrize(
    ("rate", "seconds", "milliseconds"), [(0, 1, 1000), (10**6, 1, 100), (400, 1, 750), (1, 60, 60_000)]
)
async def test_the_wait_is_within_bounds_and_a_second_where_no_rate_is_known(
    rate: int, seconds: int, milliseconds: int
) -> None:
    backlog, wire = Backlog(), Wire()
    client = EngineClient(wire, Metrics(backlog))
    admission = Admission(client, backlog, ServerSettings(max_waiting_requests=0))
    client.start()
    wire.say(INFO)
    submit(client, "a", "b")
    backlog.add("a", 100, 200)
    backlog.remove("b")
    backlog._all.value = rate
    with pytest.raises(ApiError) as caught:
        admission.check()
    assert caught.value.headers["retry-after"] == str(seconds)
    assert int(caught.value.headers["retry-after-ms"]) == pytest.approx(milliseconds, rel=0.1)
    await client.stop()


def test_a_prefill_backlog_is_a_503_over_http(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread(settings={"max_waiting_bytes": 100}, max_num_seqs=1, tick_seconds=0.05)
    with running.client() as client:
        long = {"prompt": "x" * 99, "max_tokens": 400, "stream": True}
        with running.client() as other, client.stream("POST", "/v1/completions", json=long) as first:
            pieces = first.iter_text()  # kept: an iterator that is dropped closes its response
            next(pieces)  # its prompt has been read
            with other.stream("POST", "/v1/completions", json=long) as second:
                assert second.status_code == 200
                assert samples(client.get("/metrics").text)["hnet_prompt_backlog_bytes"] == 100
                refused: httpx.Response = client.post("/v1/completions", json={"prompt": "y"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
                assert 1 <= int(refused.headers["retry-after"]) <= 60
        wait_for(lambda: client.post("/v1/completions", json={"prompt": "y"}).status_code == 200)
