from __future__ import annotations

import threading
from typing import Any, cast

import msgspec
import pytest
import zmq
from answers import wait_for

from hnet_runtime.engine.messages import EngineFailure, FromEngine, Output, Tick
from server.sender import Sender


class Socket:
    """Keeps what was sent and by which thread; fails as often as it is told to."""

    def __init__(self) -> None:
        self.sent: list[FromEngine] = []
        self.threads: set[int] = set()
        self.open = threading.Event()
        self.open.set()
        self.errors: list[Exception] = []
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def send(self, frame: bytes) -> None:
        self.open.wait(10)
        self.threads.add(threading.get_ident())
        if self.errors:
            raise self.errors.pop()
        self.sent.append(self._decoder.decode(frame))


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
def sender(socket: Socket) -> Sender:
    return Sender(cast("zmq.Socket[bytes]", socket))


def tick(name: str, **more: Any) -> Tick:
    return Tick(outputs=(Output(request_id=name, **more),))


def test_messages_leave_one_by_one_in_order_from_another_thread(sender: Sender, socket: Socket) -> None:
    messages = [tick(str(number)) for number in range(1000)]
    for message in messages:
        sender.put(message)
    sender.close()
    assert socket.sent == messages
    assert socket.threads.isdisjoint({threading.get_ident()})


def test_whoever_puts_does_not_wait_and_closing_leaves_nothing_behind(sender: Sender, socket: Socket) -> None:
    socket.open.clear()
    messages: list[FromEngine] = [tick("a"), tick("b"), EngineFailure(message="it broke")]
    for message in messages:
        sender.put(message)
    assert socket.sent == []
    threading.Timer(0.05, socket.open.set).start()
    sender.close()
    assert socket.sent == messages


def test_an_error_is_raised_by_the_next_message_and_what_follows_the_gap_is_not_sent(
    sender: Sender, socket: Socket
) -> None:
    socket.open.clear()
    sender.put(tick("sent"))
    sender.put(tick("lost", stop_reason=object()))
    sender.put(tick("after the gap"))
    socket.open.set()
    wait_for(lambda: sender._error is not None)
    with pytest.raises(TypeError, match="object"):
        sender.put(tick("too late"))
    failure = EngineFailure(message="why")
    sender.put(failure)
    sender.close()
    assert socket.sent == [tick("sent"), failure]


def test_an_error_of_the_last_message_is_raised_at_the_end(sender: Sender, socket: Socket) -> None:
    socket.errors = [zmq.ZMQError(zmq.ETERM)]
    sender.put(tick("lost"))
    with pytest.raises(zmq.ZMQError):
        sender.close()


def test_a_clean_end_raises_nothing(sender: Sender, socket: Socket) -> None:
    sender.close()
    assert socket.sent == []
