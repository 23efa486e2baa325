"""One replica: an engine in its own process and the whole HTTP application above it, called without a socket.

Knows how a server starts and ends; the routes are the application's, as everywhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message

from server.app import build_app, build_service
from server.cluster.call import Accepted, Call, Piece, Start, Whole
from server.cluster.exchange import answer
from server.engine_loop import EngineLaunch
from server.engine_process import EngineProcess
from server.engine_thread import EngineThread
from server.settings import ServerSettings

PIECES = (
    250  # a second, of all responses of a replica: each costs a few milliseconds on its way through Ray's processes
)
MAX_GATHER = 0.25  # seconds that a stream is silent for that at most


class Replica:
    """What `hnet serve` is, without its port. `start` returns once the model is loaded."""

    def __init__(self, name: str, settings: ServerSettings, launch: EngineLaunch) -> None:
        self.name = name
        flush_seconds = settings.stream_flush_ms / 1000
        transport = (
            EngineThread(launch, flush_seconds)
            if settings.in_process
            else EngineProcess(launch, flush_seconds, settings.log_level)
        )
        self._service, metrics = build_service(settings, transport)
        self._app = build_app(self._service, metrics)
        self._lifespan = _Lifespan(self._app)
        self._flush_seconds = flush_seconds
        self._open = 0  # answers under way

    async def start(self) -> None:
        """Raises RuntimeError, in one line, where the model cannot be loaded."""
        await self._lifespan.start()
        client = self._service.client
        await client.wait_until_loaded()
        if client.state != "ready":
            await self.stop()
            raise RuntimeError(client.failure or f"the engine is {client.state}")

    async def stop(self) -> None:
        await self._lifespan.stop()

    def check(self) -> None:
        """Raises RuntimeError where the engine has ended for good; one that is being started again is waited for."""
        client = self._service.client
        if client.state in ("failed", "stopped"):
            raise RuntimeError(client.failure or f"the engine is {client.state}")

    async def answer(self, call: Call) -> AsyncGenerator[Piece, None]:
        yield Accepted(self.name)
        self._open += 1
        pieces = answer(self._app, call, self._gather)
        try:
            async for piece in pieces:
                yield piece
        finally:
            self._open -= 1
            await pieces.aclose()

    def _gather(self) -> float:
        """Seconds between two pieces of one response: so many that all together are no more than PIECES a second."""
        return min(MAX_GATHER, max(self._flush_seconds, self._open / PIECES))

    async def whole(self, call: Call) -> Whole:
        """The response as one, for those that are short."""
        start, body = Start(500, ()), []
        async for piece in answer(self._app, call):
            if isinstance(piece, bytes):
                body.append(piece)
            elif isinstance(piece, Start):
                start = piece
        return Whole(self.name, start.status, start.headers, b"".join(body))


class _Lifespan:
    """An application's start and end, by ASGI's protocol for them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._running = asyncio.create_task(self._run())
        await self._step("startup")

    async def stop(self) -> None:
        """A second call does nothing."""
        if self._running is not None:
            await self._step("shutdown")
            await self._running
            self._running = None

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        await self._app(scope, self._messages.get, self._said.put)

    async def _step(self, what: str) -> None:
        await self._messages.put({"type": f"lifespan.{what}"})
        said = await self._said.get()
        if said["type"] != f"lifespan.{what}.complete":
            raise RuntimeError(f"the application's {what} failed: {said.get('message', said['type'])}")
