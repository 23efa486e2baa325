"""Server-sent events: their bytes, a response of them, and its signs of life while they are silent.

Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.errors import ApiError, internal

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0
DONE = b"data: [DONE]\n\n"

log = logging.getLogger("hnet.server")

Write = Callable[[bytes], Awaitable[None]]


def event(data: bytes) -> bytes:
    """One event; `data` is JSON on one line."""
    return b"data: " + data + b"\n\n"


class EventTemplate:
    """Events that all begin with the fields of `head`, which are encoded once."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._begin = b"data: " + msgspec.json.encode(head)[:-1] + b","

    def event(self, fields: dict[str, Any]) -> bytes:
        """One event of the head's fields and these, of which there is one at least."""
        return self._begin + msgspec.json.encode(fields)[1:] + b"\n\n"


class EventStream(Response):
    """A response whose events `produce(write)` writes; it ends with `[DONE]`, whatever happens.

    An error after the headers becomes an event; a comment says after every KEEP_ALIVE_SECONDS of silence that we live.
    When the client goes away `produce` is cancelled. `close` is called in every case, even where `produce` was never
    begun.
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
            writer = _Writer(send)
            producer = asyncio.create_task(self._run(writer))
            watcher = asyncio.create_task(disconnected(receive))
            keeper = asyncio.create_task(writer.keep_alive())
            try:
                await asyncio.wait({producer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end(producer, watcher, keeper)
        finally:
            self._close()

    async def _run(self, writer: _Writer) -> None:
        try:
            await self._produce(writer.write)
        except ApiError as error:
            await writer.write(event(error.encode()))
        except Exception:
            log.exception("request %s failed in its stream", self._request_id)
            await writer.write(event(internal(self._request_id).encode()))
        await writer.write(DONE, more=False)


class _Writer:
    """One body's way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._written = time.monotonic()
        self._is_writing = False

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Returns once there is room for what comes next."""
        self._is_writing = True
        message: Message = {"type": "http.response.body", "body": data, "more_body": more}
        await self._send(message)
        self._is_writing, self._written = not more, time.monotonic()

    async def keep_alive(self) -> None:
        """Writes a comment whenever nothing else has been for a while; not to who does not read what there is."""
        while True:
            remaining = self._written + KEEP_ALIVE_SECONDS - time.monotonic()
            if remaining > 0:
                await asyncio.sleep(remaining)
            elif self._is_writing:
                await asyncio.sleep(KEEP_ALIVE_SECONDS)
            else:
                await self.write(KEEP_ALIVE)


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
