"""One server from start to end: the socket, the signals, the drain, the exit code.

Knows uvicorn and how a server ends well; knows no route. The port stays open while the server
drains, so that probes are answered and new requests are turned away in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from server.app import build_app, build_service
from server.certificate import keep_current
from server.connection import connection_type
from server.engine_client import Transport
from server.engine_loop import EngineLaunch
from server.engine_process import EngineProcess
from server.engine_thread import EngineThread
from server.errors import shutting_down
from server.service import Service
from server.settings import ServerSettings

BACKLOG = 2048  # connections that wait to be accepted
CLOSE_SECONDS = 5  # for connections whose reader does not take the end of its response
CUT_SECONDS = 5  # until a response that was cut off then must have ended; a busy machine takes a while
KEEP_ALIVE_SECONDS = 75  # for an idle connection; longer than most proxies keep theirs
POLL_SECONDS = 0.02

log = logging.getLogger("hnet.server")


class Server:
    """A server for one model. `run` blocks until it has ended and gives the exit code.

    Raises OSError when the port cannot be had. With port 0 the system picks one: `url` tells.
    """

    def __init__(self, settings: ServerSettings, launch: EngineLaunch) -> None:
        self._settings = settings
        self._socket = bind(settings.host, settings.port)
        flush_seconds = settings.stream_flush_ms / 1000
        transport: Transport = (
            EngineThread(launch, flush_seconds)
            if settings.in_process
            else EngineProcess(launch, flush_seconds, settings.log_level)
        )
        self.service, metrics = build_service(settings, transport)
        config = uvicorn.Config(
            build_app(self.service, metrics),
            log_config=None,
            log_level="warning",
            access_log=False,
            http=connection_type(settings.header_timeout),
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            timeout_graceful_shutdown=math.ceil(CLOSE_SECONDS + CUT_SECONDS),
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        self._server = _Uvicorn(config, self)
        self._drain: asyncio.Task[None] | None = None
        self._drain_now = asyncio.Event()

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        scheme = "https" if self._settings.ssl_certfile is not None else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def failure(self) -> str | None:
        """Why the model could not be loaded, in one line; None where it was."""
        client = self.service.client
        return client.failure if client.info is None else None

    def run(self, on_ready: Callable[[Service], None] | None = None) -> int:
        """Serves until a signal or `stop`; the exit code of the process."""
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            return runner.run(self.serve(on_ready))

    async def serve(self, on_ready: Callable[[Service], None] | None = None) -> int:
        beside = [asyncio.create_task(self._after_loading(on_ready))]
        config, certfile = self._server.config, self._settings.ssl_certfile
        if certfile is not None:
            config.load()
            assert config.ssl is not None
            beside.append(asyncio.create_task(keep_current(config.ssl, certfile, self._settings.ssl_keyfile)))
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        return 1 if self.failure else 0

    def stop(self) -> None:
        """Begins the drain; a second call ends it at once. Only on the event loop (a signal's handler is)."""
        if self._drain is not None:
            self._drain_now.set()
            return
        self.service.admission.draining = True
        log.info("shutting down: %d live requests", self.service.client.num_live)
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        client = self.service.client
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout):
                while client.num_live and not self._drain_now.is_set():
                    await asyncio.sleep(POLL_SECONDS)
        if client.num_live:
            log.warning("ending %d requests that still run", client.num_live)
            client.fail_live(shutting_down(1))
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._leave_readers)

    def _leave_readers(self) -> None:
        """Cuts off whoever has not taken the end of a response by now."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _after_loading(self, on_ready: Callable[[Service], None] | None) -> None:
        client = self.service.client
        await client.wait_until_loaded()
        if client.state == "failed":
            self._server.should_exit = True
        elif client.state == "ready" and on_ready is not None:
            on_ready(self.service)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError with a message that names host and port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror or error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # from here on a client waits rather than being refused
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


class _Uvicorn(uvicorn.Server):
    """Uvicorn with our signals: its own handlers would close the port first and end streams last."""

    def __init__(self, config: uvicorn.Config, owner: Server) -> None:
        super().__init__(config)
        self._owner = owner

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        taken = []
        for number in (signal.SIGINT, signal.SIGTERM):
            # Not in the main thread (embedding, tests): whoever runs us there calls `stop`.
            with contextlib.suppress(RuntimeError, ValueError):
                loop.add_signal_handler(number, self._owner.stop)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)
