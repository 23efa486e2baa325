"""Servers for the tests: one on the fake engine in this process, and any number in their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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


def client_of(url: str, **options: Any) -> httpx.Client:
    """A client of a server on this machine; without `verify` it does not load the world's certificates each time."""
    return httpx.Client(base_url=url, **{"timeout": 20, "trust_env": False, "verify": False, **options})


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
        return client_of(self.url, **options)


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
        return client_of(self.url, **options)

    def wait_until_ready(self, seconds: float = 30) -> None:
        with self.client() as client:
            wait_for(lambda: client.get("/ready").status_code == 200, seconds)


def start_process(
    settings: dict[str, Any] | None = None,
    *,
    ready: bool = True,
    log: Path | None = None,
    constants: dict[str, Any] | None = None,
    **engine: Any,
) -> ServerProcess:
    """A real server process on the fake engine; `settings`, the engine's options and `constants` of the server's
    modules by name. What it logs is at `process.stderr`, or in the file `log`, as it has to be where it is much."""
    chosen = {"port": 0, "log_level": "warning", **(settings or {})}
    with nullcontext(subprocess.PIPE) if log is None else log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_server.py"), *map(json.dumps, (chosen, engine, constants or {}))],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))},
        )
    assert process.stdout is not None
    server = ServerProcess(process, process.stdout.readline().strip())
    if ready:
        server.wait_until_ready()
    return server


def end_process(server: ServerProcess) -> None:
    if server.process.poll() is None:
        server.process.kill()
    server.process.communicate(timeout=10)


@pytest.fixture
def serve_process() -> Iterator[Callable[..., ServerProcess]]:
    """Starts real server processes of one's own: `start_process`, and their end."""
    started: list[ServerProcess] = []

    def start(settings: dict[str, Any] | None = None, **options: Any) -> ServerProcess:
        started.append(start_process(settings, **options))
        return started[-1]

    yield start
    for server in started:
        end_process(server)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`hnet serve` as it is on the bundled model, for all who only ask; it must end with exit code 0 when asked to."""
    log = tmp_path_factory.mktemp("demo") / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HNET_")}
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli.main", "serve", "--port", "0"],
            stderr=err,
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: " ready at http://" in log.read_text() or process.poll() is not None, 90)
        assert process.poll() is None, log.read_text()
        (line,) = [line for line in log.read_text().splitlines() if " ready at " in line]
        yield ServerProcess(process, line.rpartition(" ready at ")[2])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
