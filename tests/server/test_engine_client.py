from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from hnet_runtime.engine.messages import (
    Abort,
    ByteLogprobs,
    Chunk,
    EngineFailure,
    EngineInfo,
    FromClient,
    FromEngine,
    Output,
    Request,
    Submit,
    Tick,
)
from server.admission import Backlog
from server.engine_client import EngineClient
from server.errors import ApiError, shutting_down
from server.metrics import Metrics
from server.output_stream import OutputStream

INFO = EngineInfo(
    model="m",
    device="cpu",
    dtype="float32",
    kernels="torch",
    max_model_len=10,
    max_num_seqs=2,
    stages=(),
    embedding_parameters=0,
    load_seconds=0.0,
)


class Wire:
    """A transport in the test's hands."""

    def __init__(self) -> None:
        self.sent: list[FromClient] = []
        self.say: Callable[[FromEngine], None]
        self.exit: Callable[[str], None]

    def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        self.say, self.exit = on_message, on_exit

    def send(self, message: FromClient) -> None:
        self.sent.append(message)

    async def stop(self, timeout: float) -> bool:
        self.sent.clear()
        return True


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Backlog())


@pytest.fixture
async def client(wire: Wire, metrics: Metrics) -> AsyncIterator[EngineClient]:
    client = EngineClient(wire, metrics, max_restarts=0)
    client.start()
    wire.say(INFO)
    yield client
    await client.stop()


def submit(client: EngineClient, *names: str) -> OutputStream:
    return client.submit(*(Request(request_id=name, prompt=b"\xfe") for name in names))


def gain(name: str, data: bytes = b"", **more: object) -> Tick:
    return Tick(outputs=(Output(request_id=name, data=data, **more),))  # type: ignore[arg-type]


async def test_what_a_request_gains_while_nobody_reads_is_merged(client: EngineClient, wire: Wire) -> None:
    stream = submit(client, "a", "b")
    entry = ByteLogprobs(1, -1.0)
    wire.say(gain("a", b"x", logprobs=(entry,), prompt_logprobs=(entry,), chunks=(Chunk(1, 0, 1.0),)))
    wire.say(gain("b", b"1"))
    wire.say(gain("a", b"yz", logprobs=(entry, entry), chunks=(Chunk(1, 2, 0.6),), finish_reason="length"))
    first, second = await stream.take()
    assert first == Output(
        request_id="a",
        data=b"xyz",
        logprobs=(entry, entry, entry),
        prompt_logprobs=(entry,),
        chunks=(Chunk(1, 0, 1.0), Chunk(1, 2, 0.6)),
        finish_reason="length",
    )
    assert second == Output(request_id="b", data=b"1")


async def test_a_stream_ends_when_all_its_requests_have(client: EngineClient, wire: Wire) -> None:
    stream = submit(client, "a", "b")
    wire.say(gain("a", b"x", finish_reason="stop"))
    wire.say(gain("b", b"y", finish_reason="stop"))
    assert [len(outputs) async for outputs in stream] == [2]
    assert stream.ended
    assert client.num_live == 0


async def test_a_tick_that_stands_for_several_is_told_as_one_output_a_request(
    client: EngineClient, wire: Wire, metrics: Metrics
) -> None:
    stream = submit(client, "a", "b")
    parts = [Output(request_id=name, data=data) for name, data in (("a", b"x"), ("b", b"1"), ("a", b"y"), ("a", b"z"))]
    wire.say(Tick(outputs=tuple(parts)))
    assert [(output.request_id, output.data) for output in await stream.take()] == [("a", b"xyz"), ("b", b"1")]
    wire.say(Tick(outputs=(*parts[2:], Output(request_id="b", data=b"2"))))
    assert sum(metrics.time_to_first_byte.counts) == 2
    assert sum(metrics.inter_byte_latency.counts) == 5  # all but each request's first


async def test_a_reader_waiting_for_the_end_gets_it_all_at_once(client: EngineClient, wire: Wire) -> None:
    stream = submit(client, "a")
    waiting = asyncio.create_task(stream.until_ended())
    for byte in b"abc":
        wire.say(gain("a", bytes((byte,))))
        await asyncio.sleep(0)
    assert not waiting.done()
    wire.say(gain("a", b"d", finish_reason="stop"))
    await waiting
    (output,) = await stream.take()
    assert output.data == b"abcd"


async def test_leaving_a_stream_early_aborts_what_still_runs(
    client: EngineClient, wire: Wire, metrics: Metrics
) -> None:
    with submit(client, "a", "b"):
        wire.say(gain("a", finish_reason="stop"))
    assert wire.sent[-1] == Abort(request_id="b")
    assert sum(isinstance(message, Abort) for message in wire.sent) == 1
    assert client.num_live == 1  # until the engine says so
    wire.say(gain("b", finish_reason="abort"))
    assert client.num_live == 0
    assert metrics.finished_by_reason == {"stop": 1, "abort": 1, "length": 0, "error": 0}


async def test_closing_twice_aborts_once(client: EngineClient, wire: Wire) -> None:
    stream = submit(client, "a")
    stream.close()
    stream.close()
    assert wire.sent.count(Abort(request_id="a")) == 1


async def test_a_failing_engine_ends_every_request_once(client: EngineClient, wire: Wire, metrics: Metrics) -> None:
    waiting = submit(client, "a")
    leaving = submit(client, "b")
    leaving.close()
    task = asyncio.create_task(waiting.take())
    await asyncio.sleep(0)
    wire.say(EngineFailure(message="it broke"))
    wire.exit("exit code 1")
    with pytest.raises(ApiError) as caught:
        await task
    assert (caught.value.status, caught.value.code) == (500, "engine_failed")
    assert (client.state, client.failure, client.num_live) == ("failed", "it broke", 0)
    assert metrics.finished_by_reason["error"] == 2
    with pytest.raises(RuntimeError, match="failed"):
        submit(client, "c")


async def test_an_engine_that_goes_without_a_word_has_failed(client: EngineClient, wire: Wire) -> None:
    wire.exit("the engine's process has ended (SIGKILL)")
    assert client.state == "failed"
    assert client.failure == "the engine's process has ended (SIGKILL)"


async def test_open_streams_can_be_ended_with_an_error(client: EngineClient, wire: Wire) -> None:
    stream = submit(client, "a", "b")
    client.fail_live(shutting_down(1))
    with pytest.raises(ApiError, match="shutting down"):
        await stream.take()
    assert sum(isinstance(message, Abort) for message in wire.sent) == 2


async def test_a_request_id_in_use_is_refused(client: EngineClient, wire: Wire) -> None:
    submit(client, "a")
    with pytest.raises(ValueError, match="'a' is in use"):
        submit(client, "a")
    assert sum(isinstance(message, Submit) for message in wire.sent) == 1


async def test_an_idle_engine_says_nothing_about_its_speed() -> None:
    backlog = Backlog()
    backlog.add("a", 400, 600)
    assert backlog.seconds == 0  # unknown
    start = backlog._all._since
    backlog.progress(50, 50, start + 1.0)
    assert backlog.seconds == pytest.approx(10, rel=1e-3)
    backlog.progress(50, 50, start + 2.0)
    assert backlog.seconds == pytest.approx(10, rel=1e-3)
    backlog.remove("a")
    assert backlog.seconds == 0


def test_the_idle_time_before_work_does_not_slow_the_rate() -> None:
    backlog = Backlog()
    backlog._all._since -= 60  # an idle minute
    backlog.add("a", 0, 1000)
    start = time.monotonic()
    backlog.progress(0, 1, start + 0.01)
    assert backlog.seconds == 0  # too early to tell
    backlog.progress(0, 50, start + 0.5)
    assert backlog.seconds == pytest.approx(10, rel=0.01)


def test_a_prompt_is_ahead_until_it_has_been_read() -> None:
    backlog = Backlog()
    backlog.add("a", 400, 600)
    backlog.add("b", 100, 0)
    start = backlog._all._since
    backlog.progress(50, 0, start + 1.0)
    backlog.has_read("a")
    assert backlog.unread == 100
    assert backlog.seconds == pytest.approx(700 / 50, rel=1e-3)
    assert backlog.seconds_to_read(100) == pytest.approx(2, rel=1e-3)
    backlog.remove("b")
    backlog.remove("a")
    assert (backlog.unread, backlog.seconds) == (0, 0)
    backlog.remove("a")
    assert backlog.unread == 0
