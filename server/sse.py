"""Server-sent events: their bytes, their pace, and a response that notices when nobody reads it.

Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.errors import ApiError, internal

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0
DONE = b"data: [DONE]\n\n"
LOAD_SHARE = 0.5  # of the process's time, what flushing may take before streams begin to gather

log = logging.getLogger("hnet.server")

Write = Callable[[bytes], Awaitable[None]]


def event(data: bytes) -> bytes:
    """One event; `data` is JSON on one line."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """A response whose events `produce(write)` writes; it ends with `[DONE]`, whatever happens.

    An error after the headers becomes an event. When the client goes away `produce` is cancelled.
    `close` is called in every case, even where `produce` was never begun.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(
        self,
        produce: Callable[[Write], Awaitable[None]],
        close: Callable[[], None],
        request_id: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._produce = produce
        self._close = close
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            producer = asyncio.create_task(self._run(send))
            watcher = asyncio.create_task(disconnected(receive))
            try:
                await asyncio.wait({producer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end(producer, watcher)
        finally:
            self._close()

    async def _run(self, send: Send) -> None:
        async def write(data: bytes) -> None:
            message: Message = {"type": "http.response.body", "body": data, "more_body": True}
            await send(message)

        try:
            await self._produce(write)
        except ApiError as error:
            await write(event(error.encode()))
        except Exception:
            log.exception("request %s failed in its stream", self._request_id)
            await write(event(internal(self._request_id).encode()))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


class FlushPace:
    """How long a stream gathers before it writes again, so that HTTP costs what the process can spare.

    With one stream, or while writing is cheap against the engine's ticks, nothing is held back;
    the more streams there are and the dearer a write, the longer they gather, up to `limit` seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.live = 0
        self._cost = 0.0  # seconds a flush takes, a moving average

    def measure(self, seconds: float) -> None:
        """Notes what a flush took."""
        self._cost += 0.1 * (min(seconds, self.limit) - self._cost)

    @property
    def gather_seconds(self) -> float:
        return min(self.limit, max(0, self.live - 1) * self._cost / LOAD_SHARE)


async def disconnected(receive: Receive) -> None:
    """Returns once the client has gone away (its request has been read to the end before)."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancels tasks, waits until they are gone, and raises what one of them failed with."""
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
