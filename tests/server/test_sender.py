from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from answers import wait_for
from hypothesis import given
from hypothesis import strategies as st

from hnet_runtime.engine.messages import EngineFailure, EngineStats, FromEngine, Output, StepRecord, Tick
from server.output_stream import joined
from server.sender import Sender, merged

AGES = 3600.0  # seconds; nothing held back for so long leaves in time


class Wire:
    """Keeps what was sent and by which thread; fails as often as it is told to."""

    def __init__(self) -> None:
        self.sent: list[FromEngine] = []
        self.threads: set[int] = set()
        self.open = threading.Event()
        self.open.set()
        self.errors: list[Exception] = []

    def send(self, message: FromEngine) -> None:
        self.open.wait(10)
        self.threads.add(threading.get_ident())
        if self.errors:
            raise self.errors.pop()
        frame = msgspec.msgpack.encode(message)
        self.sent.append(msgspec.msgpack.decode(frame, type=FromEngine))


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def sender(wire: Wire) -> Sender:
    return Sender(wire.send, flush_seconds=0.0)


@contextmanager
def gathering(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    """A sender that has sent a tick of two rows, "first", and now holds back what comes."""
    monkeypatch.setattr("server.sender.SECONDS_PER_ROW", AGES)
    sender = Sender(wire.send, flush_seconds=AGES)
    sender.put(busy("first"))
    wait_for(lambda: wire.sent == [busy("first")])
    yield sender
    sender.close()


def tick(name: str, **more: Any) -> Tick:
    return Tick(outputs=(Output(request_id=name, **more),))


def names(wire: Wire) -> list[str]:
    """Whose outputs were sent, in order."""
    return [output.request_id for message in wire.sent if isinstance(message, Tick) for output in message.outputs]


def busy(name: str, **more: Any) -> Tick:
    """A tick of two rows that run."""
    return msgspec.structs.replace(tick(name, **more), stats=EngineStats(running=2))


def test_messages_leave_in_order_from_another_thread(sender: Sender, wire: Wire) -> None:
    messages = [tick(str(number)) for number in range(1000)]
    for message in messages:
        sender.put(message)
    sender.close()
    assert names(wire) == [str(number) for number in range(1000)]
    assert wire.threads.isdisjoint({threading.get_ident()})


def test_whoever_puts_does_not_wait_and_closing_leaves_nothing_behind(sender: Sender, wire: Wire) -> None:
    wire.open.clear()
    messages: list[FromEngine] = [tick("a"), tick("b"), EngineFailure(message="it broke")]
    for message in messages:
        sender.put(message)
    assert wire.sent == []
    threading.Timer(0.05, wire.open.set).start()
    sender.close()
    assert names(wire) == ["a", "b"]
    assert wire.sent[-1] == messages[-1]


def test_an_error_is_raised_by_the_next_message_and_what_follows_the_gap_is_not_sent(
    sender: Sender, wire: Wire
) -> None:
    wire.open.clear()
    sender.put(tick("sent"))
    wait_for(lambda: sender._queue.empty())
    sender.put(tick("lost", stop_reason=object()))
    sender.put(tick("after the gap"))
    wire.open.set()
    wait_for(lambda: sender._error is not None)
    with pytest.raises(TypeError, match="object"):
        sender.put(tick("too late"))
    failure = EngineFailure(message="why")
    sender.put(failure)
    sender.close()
    assert wire.sent == [tick("sent"), failure]


def test_an_error_of_the_last_message_is_raised_at_the_end(sender: Sender, wire: Wire) -> None:
    wire.errors = [OSError("broken")]
    sender.put(tick("lost"))
    with pytest.raises(OSError, match="broken"):
        sender.close()


def test_a_clean_end_raises_nothing(sender: Sender, wire: Wire) -> None:
    sender.close()
    assert wire.sent == []


def test_ticks_of_one_row_are_never_held_back(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sender.SECONDS_PER_ROW", AGES)
    sender = Sender(wire.send, flush_seconds=AGES)
    for number in range(3):
        lone = msgspec.structs.replace(tick(str(number)), stats=EngineStats(running=1))
        sender.put(lone)
        wait_for(lambda lone=lone: wire.sent[-1:] == [lone])
    sender.close()


@pytest.mark.parametrize(
    "last",
    [
        lambda sender: sender.put(busy("d", finish_reason="stop")),
        lambda sender: sender.put(EngineFailure(message="why")),
        lambda sender: sender.close(),
    ],
    ids=["the end of a request", "a message that is no tick", "the end of all"],
)
def test_what_is_held_back_leaves_at_once_with(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, last: Callable[[Sender], None]
) -> None:
    with gathering(wire, monkeypatch) as sender:
        for name in "abc":
            sender.put(busy(name))
        last(sender)
        wait_for(lambda: names(wire)[:4] == ["first", "a", "b", "c"])


def test_under_load_ticks_become_one_that_leaves_within_the_time_given(wire: Wire) -> None:
    sender = Sender(wire.send, flush_seconds=0.001)
    for number in range(1000):
        sender.put(busy(str(number)))
    wait_for(lambda: names(wire) == [str(number) for number in range(1000)])  # though nothing more comes
    assert len(wire.sent) < 1000
    sender.close()


def outputs() -> st.SearchStrategy[Output]:
    return st.builds(
        Output,
        request_id=st.sampled_from("abc"),
        data=st.binary(max_size=3),
        opened=st.integers(0, 2),
        finish_reason=st.sampled_from([None, None, "stop"]),
    )


def ticks() -> st.SearchStrategy[Tick]:
    steps = st.lists(st.builds(StepRecord, st.just("byte"), st.integers(0, 2), st.just(1), st.just(0.5)), max_size=2)
    waits = st.lists(st.tuples(st.integers(1, 2), st.just(0.25)), max_size=2)
    stats = st.builds(EngineStats, running=st.integers(0, 3), steps=steps.map(tuple), park_waits=waits.map(tuple))
    return st.builds(Tick, outputs=st.lists(outputs(), max_size=4).map(tuple), stats=stats)


@given(st.lists(ticks(), min_size=1), st.data())
def test_however_ticks_are_merged_they_say_the_same(series: list[Tick], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(series)))) | {0, len(series)})
    batches = [series[begin:end] for begin, end in pairwise(cuts)]
    sent = [tick for batch in batches for tick in merged(batch) if isinstance(tick, Tick)]
    assert len(sent) == len(batches)
    assert [tick.stats.running for tick in sent] == [batch[-1].stats.running for batch in batches]
    for column in ("steps", "park_waits"):
        assert sum((getattr(tick.stats, column) for tick in sent), ()) == sum(
            (getattr(tick.stats, column) for tick in series), ()
        )
    told = [joined(tick.outputs) for tick in sent]
    assert all(len({output.request_id for output in own}) == len(own) for own in told)
    assert joined(output for own in told for output in own) == joined(
        output for tick in series for output in tick.outputs
    )
