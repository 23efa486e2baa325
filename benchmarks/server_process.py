"""A server in a process of its own on the loopback, waited for and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class ServerProcess:
    """Runs `command`; `ready` is the path that answers 200 once it serves. Used in a `with`, which ends it."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        ready: str,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.port, self._ready = port, ready
        self._started = time.perf_counter()
        with open(log or os.devnull, "wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=output if log else None,
                start_new_session=True,
            )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: it and its children, nobody else
            self._process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped while the block runs, so that what it does when idle costs another server nothing."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def pids(self) -> list[int]:
        """The server's process, then those it started and those that they did (Linux)."""
        found = [self._process.pid]
        for pid in found:
            with suppress(FileNotFoundError, ProcessLookupError):  # it ends while we look
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (thread / "children").read_text(encoding="ascii").split())
        return found

    def private_bytes(self) -> int:
        """Memory that the server and the processes it started have for themselves (Linux)."""
        found = 0
        for pid in self.pids():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ends while we look
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
        return found

    def wait(self, seconds: float = 600.0) -> float:
        """Seconds from the start to the first answer; raises RuntimeError if the server ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}", timeout=5) as answer:
                    if answer.status == 200:
                        return time.perf_counter() - self._started
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise RuntimeError("the server was not ready in time")


def our_server(model: str, port: int, *options: str) -> ServerProcess:
    """`hnet serve` of this checkout."""
    command = [sys.executable, "-m", "server.cli.main", "serve", *([] if model == "demo" else [model])]
    command += ["--port", str(port), "--log-level", "error", "--max-model-len", "2048", *options]
    return ServerProcess(command, port, "/ready")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
