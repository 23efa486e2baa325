"""A process that does what a client may have made endless, and may be killed for it.

Both halves: the parent's `LimitedProcess`, and `serve`, which a module run by `python -m` calls. Nothing in one process
bounds the time and memory of foreign code, so it runs apart, under limits of the system, and the parent ends it when
it takes too long. Frames of four bytes of length, then JSON: the child says `{}` when it has started, is sent the one
document that all its work is about, and then answers job after job. Knows no messages and no HTTP.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
MEMORY_BYTES = 1 << 29  # that a job may take
CPU_SECONDS = 10  # that one may take where no parent is left to end it


class TookTooLong(Exception):
    """A job took more time than it may; its process was killed."""


class ProcessEnded(Exception):
    """The process ended under a job: it took too much memory or time."""


class LimitedProcess:
    """The parent's half: a child that runs `module`, started when it is needed, killed when a job takes too long.

    subject: the document that all jobs are about.
    """

    def __init__(self, module: str, subject: Any) -> None:
        self._module, self._subject = module, subject
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()

    def ask(self, job: Any, seconds: float) -> Any:
        """The answer to a job; blocks for so many seconds at most, and a start before them.

        Raises TookTooLong, ProcessEnded, and RecursionError for a job that is nested too deeply.
        """
        with self._lock:
            try:
                connection = self._connection or self._start()
                deadline = time.monotonic() + seconds
                connection.settimeout(seconds)
                send_frame(connection, job)
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                return receive_frame(connection)
            except TimeoutError:
                self._end()
                raise TookTooLong from None
            except (EOFError, OSError):
                self._end()
                raise ProcessEnded from None

    def close(self) -> None:
        """Ends the process, a job included."""
        if self._process is not None:
            self._process.kill()
        with self._lock:
            self._end()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,  # the terminal's Ctrl-C is for the server
            )
        self._connection = ours
        ours.settimeout(START_SECONDS)
        receive_frame(ours)
        send_frame(ours, self._subject)
        return ours

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def serve(prepare: Callable[[Any], Callable[[Any], Any]]) -> None:
    """The child's half: `prepare` makes of the subject what answers jobs. Returns when the parent is gone.

    Whatever takes long to import is imported before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole service at once; the server drains first
    connection = socket.socket(fileno=os.dup(0))
    try:
        send_frame(connection, {})
        answer = prepare(receive_frame(connection))
        _limit_memory()
        while True:
            job = receive_frame(connection)
            _limit_time()
            send_frame(connection, answer(job))
    except (EOFError, OSError):
        return


def send_frame(connection: socket.socket, document: Any) -> None:
    data = json.dumps(document).encode()
    connection.sendall(len(data).to_bytes(4, "big") + data)


def receive_frame(connection: socket.socket) -> Any:
    """One document; raises EOFError when the other side is gone."""
    size = int.from_bytes(_receive(connection, 4), "big")
    return json.loads(_receive(connection, size))


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, resource.RLIM_INFINITY))


def _limit_time() -> None:
    if sys.platform != "win32":
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_SECONDS, most))
