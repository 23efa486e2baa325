"""The engine's messages on their way out: gathered, and handed on in a thread of their own, in order.

The model's thread only puts them down and goes on; its kernels leave Python's lock to whoever hands them on meanwhile.
Under load the ticks of some milliseconds become one, so that the server is woken, and its streams written to, once for
all of them. Knows messages; no engine and no transport: where they go is a callable.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from hnet_runtime.engine.messages import EngineFailure, FromEngine, Tick

# An event costs server and client some tenth of a millisecond of a core: so streams take a fraction of one, however
# many they are.
SECONDS_PER_ROW = 0.0005

log = logging.getLogger("hnet.engine")


class Sender:
    """Calls `send` with every message, from one thread: nobody else does until `close` has returned.

    flush_seconds: the longest that a tick is held back; the more rows run the longer it is. One row's are not held back
    at all, nor is one that comes after a longer pause, and none that ends a request.
    An error of the thread is raised where messages come from: by the next `put`, or by `close`. Nothing leaves after
    the message that was lost, but an EngineFailure.
    """

    def __init__(self, send: Callable[[FromEngine], None], flush_seconds: float) -> None:
        self._send = send
        self._flush_seconds = flush_seconds
        self._queue: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._hurry = threading.Event()  # something waits that is not to be held back
        self._error: Exception | None = None
        self._is_told = False  # somebody has been given the error
        self._thread = threading.Thread(target=self._send_all, name="hnet-engine-sender", daemon=True)
        self._thread.start()

    def put(self, message: FromEngine) -> None:
        """Takes a message to send; raises what went wrong with one before it, except for an EngineFailure."""
        if self._error is not None and not isinstance(message, EngineFailure):
            self._is_told = True
            raise self._error
        self._queue.put(message)
        if not isinstance(message, Tick) or any(output.finish_reason is not None for output in message.outputs):
            self._hurry.set()

    def close(self) -> None:
        """Returns once every message has been sent; raises an error that no `put` has raised."""
        self._queue.put(None)
        self._hurry.set()
        self._thread.join()
        if self._error is not None and not self._is_told:
            self._is_told = True
            raise self._error

    def _send_all(self) -> None:
        is_open = True
        while is_open:
            messages, is_open = self._take()
            for message in merged(messages):
                if self._error is not None and not isinstance(message, EngineFailure):
                    continue  # what follows a gap would be read as if there were none
                try:
                    self._send(message)
                except Exception as error:
                    log.exception("a message to the server is lost")
                    self._error = error
            if is_open and isinstance(messages[-1], Tick):
                self._gather(messages[-1].stats.running)

    def _take(self) -> tuple[list[FromEngine], bool]:
        """What has come, at least one message where the end has not; and whether more is to come."""
        messages: list[FromEngine] = []
        message = self._queue.get()
        while message is not None:
            messages.append(message)
            if self._queue.empty():
                return messages, True
            message = self._queue.get()
        return messages, False

    def _gather(self, running: int) -> None:
        if running > 1:
            self._hurry.wait(min(self._flush_seconds, running * SECONDS_PER_ROW))
        self._hurry.clear()


def merged(messages: Iterable[FromEngine]) -> Iterator[FromEngine]:
    """The messages in order, ticks that follow one another as one; a request may have several Outputs in it."""
    ticks: list[Tick] = []
    for message in messages:
        if isinstance(message, Tick):
            ticks.append(message)
            continue
        if ticks:
            yield _one(ticks)
            ticks = []
        yield message
    if ticks:
        yield _one(ticks)


def _one(ticks: Sequence[Tick]) -> Tick:
    """The last one's state, and what came and was done in all of them."""
    if len(ticks) == 1:
        return ticks[0]
    stats = msgspec.structs.replace(
        ticks[-1].stats,
        park_waits=tuple(wait for tick in ticks for wait in tick.stats.park_waits),
        steps=tuple(step for tick in ticks for step in tick.stats.steps),
    )
    return Tick(outputs=tuple(output for tick in ticks for output in tick.outputs), stats=stats)
