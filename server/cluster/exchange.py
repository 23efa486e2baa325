"""An ASGI application without a socket: a call in, the pieces of its response out, and its start and end.

Knows ASGI; knows neither Ray nor any route.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Scope

from server.cluster.call import Call, Headers, Piece, Start


async def answer(app: ASGIApp, call: Call, gather: Callable[[], float] = lambda: 0.0) -> AsyncGenerator[Piece, None]:
    """The application's response: a Start, then its body as it comes, what waits at once as one piece.

    gather: seconds that lie between two pieces of a body at least, for each costs its way through several processes.
    The application waits meanwhile, and a stream of events merges what it has to say; only the end does not wait.

    Closed early, it tells the application that the client has gone, and waits for it to end.
    """
    exchange = _Exchange(call, gather)
    running = asyncio.create_task(exchange.run(app))
    try:
        while (piece := await exchange.next()) is not None:
            yield piece
    finally:
        await exchange.leave()
        await running


class _Exchange:
    def __init__(self, call: Call, gather: Callable[[], float]) -> None:
        self._call, self._gather = call, gather
        self._given = -math.inf  # when the last piece of the body was
        self._change = asyncio.Condition()  # of anything below
        self._body_taken = self._gone = self._ended = False
        self._start: Start | None = None
        self._waiting: list[bytes] = []

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(_scope(self._call), self._receive, self._send)
        finally:
            async with self._change:
                self._ended = True
                self._change.notify_all()

    async def next(self) -> Piece | None:
        """What comes next, all of the body that waits in one; None at the end."""
        async with self._change:
            await self._change.wait_for(lambda: self._start or self._waiting or self._ended)
            if self._start is not None:
                start, self._start = self._start, None
                return start
            if self._waiting and (early := self._given + self._gather() - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(early):
                        await self._change.wait_for(lambda: self._ended)
            if not self._waiting:
                return None
            self._given = time.monotonic()
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._change.notify_all()
            return data

    async def leave(self) -> None:
        """Nobody reads any more."""
        async with self._change:
            self._gone = True
            self._change.notify_all()

    async def _receive(self) -> Message:
        if not self._body_taken:
            self._body_taken = True
            return {"type": "http.request", "body": self._call.body, "more_body": False}
        async with self._change:
            await self._change.wait_for(lambda: self._gone)
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        async with self._change:
            if message["type"] == "http.response.start":
                self._start = Start(message["status"], _headers(message))
            elif message.get("body"):
                await self._change.wait_for(lambda: self._gone or not self._waiting)
                self._waiting.append(bytes(message["body"]))
            self._change.notify_all()


def _headers(message: Message) -> Headers:
    return tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))


def _scope(call: Call) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": call.scheme,
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": call.client,
        "server": None,
        "state": {},
    }
