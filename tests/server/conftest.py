"""Servers for the tests: one on the fake engine in this process, and any number in their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where the fake engine's factory is found by name

from answers import wait_for

from server.engine_loop import EngineLaunch
from server.serving import Server
from server.settings import ServerSettings

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass
class Running:
    """A server in a thread of this process, engine included."""

    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def url(self) -> str:
        return self.server.url

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)


def start_in_thread(settings: ServerSettings, factory: str = "fake_engine:build", **engine: Any) -> Running:
    """Starts a server, on the fake engine if not told otherwise, and waits until it is ready."""
    server = Server(settings, EngineLaunch(factory=factory, arguments=engine))
    started: list[asyncio.AbstractEventLoop] = []
    ready = threading.Event()

    async def main() -> None:
        started.append(asyncio.get_running_loop())
        await server.serve(lambda service: ready.set())

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(20)
    return Running(server, started[0], thread)


def stop_thread(running: Running) -> None:
    running.loop.call_soon_threadsafe(running.server.stop)
    running.thread.join(20)
    assert not running.thread.is_alive()


@pytest.fixture(scope="session")
def shared() -> Iterator[Running]:
    """One quick server for all tests that only ask and look at the answer."""
    running = start_in_thread(ServerSettings(port=0, in_process=True, log_level="warning", drain_timeout=1))
    yield running
    stop_thread(running)


@pytest.fixture(scope="session")
def http(shared: Running) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with shared.client() as client:
        yield client


@pytest.fixture
def serve_in_thread() -> Iterator[Callable[..., Running]]:
    """Starts servers of one's own: `serve_in_thread(settings={…}, engine option=…)`."""
    started: list[Running] = []

    def start(settings: dict[str, Any] | None = None, **engine: Any) -> Running:
        chosen = {"port": 0, "in_process": True, "log_level": "warning", "drain_timeout": 1.0, **(settings or {})}
        started.append(start_in_thread(ServerSettings(**chosen), **engine))
        return started[-1]

    yield start
    for running in started:
        stop_thread(running)


@dataclass
class ServerProcess:
    """A server in a process of its own, its engine in another one."""

    process: subprocess.Popen[str]
    url: str

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)

    def wait_until_ready(self, seconds: float = 30) -> None:
        with self.client() as client:
            wait_for(lambda: client.get("/ready").status_code == 200, seconds)


@pytest.fixture
def serve_process() -> Iterator[Callable[..., ServerProcess]]:
    """Starts real server processes on the fake engine: `serve_process(settings={…}, engine option=…)`."""
    started: list[subprocess.Popen[str]] = []

    def start(settings: dict[str, Any] | None = None, *, ready: bool = True, **engine: Any) -> ServerProcess:
        chosen = {"port": 0, "log_level": "info", **(settings or {})}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_server.py"), json.dumps(chosen), json.dumps(engine)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))},
        )
        started.append(process)
        assert process.stdout is not None
        server = ServerProcess(process, process.stdout.readline().strip())
        if ready:
            server.wait_until_ready()
        return server

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)
