"""An engine in a thread of this process: for tests and for embedding.

It shares Python's lock with whatever else runs here, so a server under load wants
`server.engine_process` instead. Both are driven by the same loop and the same messages.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from hnet_runtime.engine.messages import FromClient, FromEngine, Shutdown
from server.engine_loop import EngineLaunch, serve_engine
from server.sender import Sender

LEAST_SECONDS = 0.5  # for a thread that has failed to come to its end


class EngineThread:
    """Transport to an engine in a daemon thread; messages cross as objects, nothing is encoded.

    `flush_seconds`: how long ticks are gathered under load.
    """

    def __init__(self, launch: EngineLaunch, flush_seconds: float = 0.0) -> None:
        self._launch = launch
        self._flush_seconds = flush_seconds
        self._inbox: queue.SimpleQueue[FromClient] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        """Starts a thread; both callables run on the event loop that is running now."""
        loop = asyncio.get_running_loop()
        inbox: queue.SimpleQueue[FromClient] = queue.SimpleQueue()  # what was sent to another engine is not this one's
        self._inbox = inbox

        def call(function: Callable[..., None], *arguments: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(function, *arguments)

        def run() -> None:
            sender = Sender(partial(call, on_message), self._flush_seconds)
            try:
                serve_engine(self._launch, partial(_receive, inbox), sender.put)
            finally:
                sender.close()
                call(on_exit, "the engine's thread has ended")

        self._thread = threading.Thread(target=run, name="hnet-engine", daemon=True)
        self._thread.start()

    def send(self, message: FromClient) -> None:
        self._inbox.put(message)

    async def stop(self, timeout: float) -> bool:
        """Asks the engine to end and waits up to `timeout` seconds (at least LEAST_SECONDS).

        A thread cannot be ended from outside: False for one that stays, which is left behind.
        """
        if self._thread is None:
            return True
        self._inbox.put(Shutdown())
        await asyncio.to_thread(self._thread.join, max(timeout, LEAST_SECONDS))
        return not self._thread.is_alive()


def _receive(inbox: queue.SimpleQueue[FromClient], timeout: float) -> Sequence[FromClient]:
    messages: list[FromClient] = []
    try:
        messages.append(inbox.get(timeout=timeout) if timeout else inbox.get_nowait())
        while True:
            messages.append(inbox.get_nowait())
    except queue.Empty:
        return messages
