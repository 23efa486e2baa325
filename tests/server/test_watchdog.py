"""Engines that die or hang, and the servers that outlive them: the client alone, then the real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from answers import events, expected, samples, wait_for
from conftest import Running, ServerProcess
from processes import alive, children, finished
from test_engine_client import INFO, Wire, gain, submit

from hnet_runtime.engine.messages import EngineFailure, EngineStats, Tick
from server import engine_client
from server.admission import Backlog
from server.engine_client import EngineClient
from server.errors import ApiError
from server.metrics import FINISH_REASONS, Metrics

Serve = Callable[..., ServerProcess]


class Engines(Wire):
    """A transport that notes how often an engine was started and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = self.stops = 0
        self.can_be_ended = True
        self.errors: list[Exception] = []

    def start(self, on_message: Any, on_exit: Any) -> None:
        self.starts += 1
        if self.errors:
            raise self.errors.pop()
        super().start(on_message, on_exit)

    async def stop(self, timeout: float) -> bool:
        self.stops += 1
        return self.can_be_ended


@asynccontextmanager
async def started(wire: Engines, metrics: Metrics | None = None, **options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(wire, metrics or Metrics(Backlog()), **options)
    client.start()
    wire.say(INFO)
    yield client
    await client.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(engine_client, "MAX_DELAY", 1000.0)


async def test_an_engine_that_failed_is_ended_and_started_again(quick: None) -> None:
    wire = Engines()
    async with started(wire) as client:
        stream = submit(client, "a")
        wire.say(EngineFailure(message="it broke"))
        assert (client.state, client.failure) == ("restarting", "it broke")
        with pytest.raises(ApiError, match="failed while it worked"):
            await stream.take()
        with pytest.raises(RuntimeError, match="restarting"):
            submit(client, "b")
        await until(lambda: wire.starts == 2)
        assert wire.stops == 1
        wire.say(INFO)
        assert (client.state, client.failure, client.restarts) == ("ready", None, 1)
        stream = submit(client, "a")
        wire.say(gain("a", b"x", finish_reason="stop"))
        assert [output.data for output in await stream.take()] == [b"x"]


async def test_what_an_engine_says_after_its_end_is_not_heard(quick: None) -> None:
    wire = Engines()
    async with started(wire) as client:
        say, leave = wire.say, wire.exit
        say(EngineFailure(message="it broke"))
        await until(lambda: wire.starts == 2)
        wire.say(INFO)
        submit(client, "a")
        say(gain("a", b"x", finish_reason="stop"))
        leave("exit code 1")
        assert (client.state, client.num_live) == ("ready", 1)


async def test_a_silent_engine_is_ended_with_what_it_worked_on(quick: None) -> None:
    wire, metrics = Engines(), Metrics(Backlog())
    async with started(wire, metrics, engine_timeout=0.05) as client:
        stream = submit(client, "a")
        wire.say(gain("a", b"x"))
        await until(lambda: client.state == "restarting")
        assert str(client.failure).startswith("the engine has been silent for")
        assert [output.data for output in await stream.take()] == [b"x"]  # what was gained before comes first
        with pytest.raises(ApiError, match="failed while it worked"):
            await stream.take()
        assert metrics.finished_by_reason["error"] == 1
        await until(lambda: wire.starts == 2)


async def test_an_engine_that_is_heard_of_in_time_is_let_be() -> None:
    wire = Engines()
    async with started(wire, engine_timeout=0.4) as client:
        for _ in range(12):
            await asyncio.sleep(0.08)
            wire.say(Tick())
        assert (client.state, wire.stops) == ("ready", 0)


async def test_messages_that_came_while_the_server_itself_stood_still_are_read_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "WATCH_SECONDS", 0.05)
    wire = Engines()
    async with started(wire, engine_timeout=10) as client:
        client._heard -= 20  # as if nothing had been read for long
        await asyncio.sleep(0.075)  # one look has seen it, and the second one is due
        assert client._is_wedged()
        wire.say(Tick())
        await asyncio.sleep(0.1)
        assert (client.state, wire.stops) == ("ready", 0)


async def test_an_engine_that_hangs_while_it_is_loaded_again_is_ended_too(quick: None) -> None:
    wire = Engines()
    async with started(wire, engine_timeout=0.05) as client:
        wire.say(EngineFailure(message="it broke"))
        await until(lambda: wire.starts == 3)
        assert client.restarts == 2
        assert str(client.failure).startswith("the engine has been silent for")


async def test_delays_double_to_a_minute_and_begin_anew_after_a_minute_of_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "FIRST_DELAY", 1e-6)
    monkeypatch.setattr(engine_client, "MAX_DELAY", 60e-6)
    delays: list[float] = []
    wire = Engines()
    async with started(wire) as client:
        for _ in range(8):
            client._began = client._heard + 1  # it did not serve at all
            starts = wire.starts
            wire.say(EngineFailure(message="it broke"))
            delays.append(round((client._due - client._heard) * 1e6))
            await until(lambda starts=starts: wire.starts == starts + 1)
            wire.say(INFO)
        assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
        client._began = client._heard - 1
        wire.say(EngineFailure(message="it broke"))
        assert round((client._due - client._heard) * 1e6) == 1


async def test_after_so_many_restarts_in_a_row_an_engine_is_given_up(quick: None) -> None:
    wire = Engines()
    async with started(wire, max_restarts=2) as client:
        for count in (2, 3):
            wire.say(EngineFailure(message="it broke"))
            await until(lambda count=count: wire.starts == count)
            wire.say(INFO)
        wire.say(EngineFailure(message="it broke for good"))
        assert (client.state, client.failure) == ("failed", "it broke for good")
        await until(lambda: wire.stops == 3)  # it is ended all the same
        assert wire.starts == 3


async def test_a_restart_that_cannot_be_begun_is_tried_again(quick: None) -> None:
    wire = Engines()
    async with started(wire) as client:
        wire.errors = [OSError("no processes left")]
        wire.say(EngineFailure(message="it broke"))
        await until(lambda: wire.starts == 2)
        assert client.failure == "the engine could not be started: no processes left"
        await until(lambda: wire.starts == 3)
        wire.say(INFO)
        assert client.state == "ready"


async def test_an_engine_that_cannot_be_ended_is_not_started_beside_itself(quick: None) -> None:
    wire = Engines()
    wire.can_be_ended = False
    async with started(wire) as client:
        wire.say(EngineFailure(message="it broke"))
        await until(lambda: client.state == "failed")
        assert wire.starts == 1


async def test_an_engine_that_never_was_ready_is_not_started_again() -> None:
    wire = Engines()
    client = EngineClient(wire, Metrics(Backlog()))
    client.start()
    wire.say(EngineFailure(message="key 'x' is missing"))
    assert client.state == "failed"
    await client.stop()
    assert wire.starts == 1


async def test_stopping_ends_a_restart_that_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "FIRST_DELAY", 30.0)
    wire = Engines()
    async with started(wire) as client:
        wire.say(EngineFailure(message="it broke"))
        assert 29 < client.seconds_to_restart < 31
    assert (client.state, wire.starts) == ("stopped", 1)


async def test_totals_add_up_over_engines(quick: None) -> None:
    wire, metrics = Engines(), Metrics(Backlog())
    first = EngineStats(prompt_bytes_total=5, generation_bytes_total=7, chunks_total=(3, 1), preemptions_total=2)
    second = EngineStats(prompt_bytes_total=10, chunks_total=(1, 1), prefix_cache_hits_bytes_total=4)
    async with started(wire, metrics):
        wire.say(Tick(stats=first))
        wire.say(EngineFailure(message="it broke"))
        assert metrics.totals == first
        await until(lambda: wire.starts == 2)
        wire.say(INFO)
        wire.say(Tick(stats=second))
        assert metrics.totals == EngineStats(
            prompt_bytes_total=15,
            generation_bytes_total=7,
            chunks_total=(4, 2),
            preemptions_total=2,
            prefix_cache_hits_bytes_total=4,
        )


# The real processes.

SOON = {"server.engine_client.FIRST_DELAY": 0.4}  # seconds before a restart, which an operator waits longer for
LONG = {"prompt": "x", "max_tokens": 500, "temperature": 0}


def in_thread(function: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    return thread, answers


def counted(client: httpx.Client) -> dict[str, float]:
    return samples(client.get("/metrics").text)


def serves(client: httpx.Client) -> bool:
    answer = client.post("/v1/completions", json={"prompt": "abc", "temperature": 0})
    return answer.status_code == 200 and answer.json()["choices"][0]["text"].encode() == expected(b"abc")


def test_an_engine_killed_in_the_middle_of_streams_is_started_again_and_counters_add_up(serve_process: Serve) -> None:
    server = serve_process(tick_seconds=0.005, constants=SOON)
    (engine,) = children(server.process.pid)
    with server.client() as client, server.client() as other:
        assert serves(client)
        whole, answers = in_thread(lambda: httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=20))
        with client.stream("POST", "/v1/completions", json={**LONG, "n": 2, "stream": True}) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            wait_for(lambda: counted(other)["hnet_num_requests_running"] == 3)
            before = counted(other)
            os.kill(engine, signal.SIGKILL)
            text += "".join(pieces)
        whole.join()
        *_, last = events(text)
        assert last["error"]["code"] == "engine_failed"
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (500, "engine_failed")
        ready, refused = client.get("/ready"), client.post("/v1/completions", json=LONG)
        assert ready.status_code == 503
        assert "SIGKILL" in ready.json()["status"]
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 200
        server.wait_until_ready()
        (again,) = children(server.process.pid)
        assert again != engine
        assert serves(client)
        after = counted(client)
    assert after["hnet_engine_restarts_total"] == 1
    assert after['hnet_request_finished_total{reason="error"}'] == 3
    assert sum(after[f'hnet_request_finished_total{{reason="{reason}"}}'] for reason in FINISH_REASONS) == 5
    assert after['hnet_admission_rejections_total{reason="engine_down"}'] == 1
    totals = [name for name in before if name.partition("{")[0].endswith("_total")]
    assert all(after[name] >= before[name] for name in totals)
    assert after["hnet_generation_bytes_total"] >= before["hnet_generation_bytes_total"] + 16
    server.process.send_signal(signal.SIGTERM)
    assert finished(server)[0] == 0
    assert not alive(again)


@pytest.mark.parametrize("stop", [None, signal.SIGSTOP])
def test_an_engine_that_hangs_is_ended_and_started_again(serve_process: Serve, stop: signal.Signals | None) -> None:
    server = serve_process(settings={"engine_timeout": 1.5}, tick_seconds=0.005, constants=SOON)
    (engine,) = children(server.process.pid)
    with server.client() as client:
        body = {**LONG, "prompt": "abc" if stop else "abc!hang", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            if stop:
                os.kill(engine, stop)
            text += "".join(pieces)
        assert events(text)[-1]["error"]["code"] == "engine_failed"
        assert "silent" in client.get("/ready").json()["status"]
        wait_for(lambda: not alive(engine))
        server.wait_until_ready()
        assert serves(client)
        assert counted(client)["hnet_engine_restarts_total"] == 1


def test_a_long_step_is_no_wedged_one(serve_process: Serve) -> None:
    server = serve_process(settings={"engine_timeout": 4}, tick_seconds=1.2)
    with server.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, "temperature": 0})
        assert answer.json()["choices"][0]["text"] == "ab"
        assert counted(client)["hnet_engine_restarts_total"] == 0


def test_a_server_drains_while_its_engine_is_being_started_again(serve_process: Serve) -> None:
    server = serve_process(load_seconds=0.3, constants=SOON)
    (engine,) = children(server.process.pid)
    with server.client() as client:
        os.kill(engine, signal.SIGKILL)
        wait_for(lambda: client.get("/ready").status_code == 503)
        wait_for(lambda: children(server.process.pid))  # it loads again
    server.process.send_signal(signal.SIGTERM)
    code, log = finished(server)
    assert code == 0
    assert "Traceback" not in log


def test_an_engine_that_hangs_while_the_server_drains_ends_its_streams(serve_process: Serve) -> None:
    server = serve_process(settings={"engine_timeout": 1, "drain_timeout": 60})
    with server.client() as client:
        body = {**LONG, "prompt": "abc!hang", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            server.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
    assert events(text)[-1]["error"]["code"] == "engine_failed"
    assert finished(server)[0] == 0


def test_an_engine_in_a_thread_is_started_again_after_a_crash(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread().client() as client:
        assert client.post("/v1/completions", json={"prompt": "!crash"}).status_code == 500
        assert client.get("/ready").status_code == 503
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert serves(client)


def test_an_engine_in_a_thread_that_hangs_is_left_behind_and_said_to_be(
    serve_in_thread: Callable[..., Running],
) -> None:
    with serve_in_thread(settings={"engine_timeout": 0.5}).client() as client:
        body = {**LONG, "prompt": "abc!hang"}
        assert client.post("/v1/completions", json=body).json()["error"]["code"] == "engine_failed"
        wait_for(lambda: "again" not in client.get("/ready").json()["status"])
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
