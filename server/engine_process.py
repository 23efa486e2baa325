"""The engine in a process of its own: `python -m server.engine_process`, and the parent's half.

Python's lock is never shared between HTTP and the model, and an engine that crashes is an
error message here, not a dead port. Two ZeroMQ pipes over sockets in a private directory, a
msgpack message for each tick or for several, sent by a thread beside the model's (`server.sender`).
The child ends when the parent does, whatever the parent died of.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import msgspec
import zmq

from hnet_runtime.engine.messages import FromClient, FromEngine, Shutdown
from server.engine_loop import EngineLaunch, Progress, serve_engine
from server.sender import Sender

PARENT_CHECK_SECONDS = 1.0
DRAIN_AT_ONCE = 64  # messages taken from the socket before other work of the event loop gets its turn
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("hnet.engine")

_encoder = msgspec.msgpack.Encoder()


class EngineProcess:
    """Transport to an engine in a child process.

    `flush_seconds`: how long ticks are gathered under load; `log_level` is a name of `logging`; `environment` is added
    to the child's.
    """

    def __init__(
        self,
        launch: EngineLaunch,
        flush_seconds: float = 0.0,
        log_level: str = "info",
        environment: dict[str, str] | None = None,
    ):
        self._launch = launch
        self._flush_seconds = flush_seconds
        self._log_level = log_level
        self._environment = environment or {}
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._directory: str | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The child's process id, once started."""
        return self._process.pid if self._process else None

    def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        """Starts a child, for the first time or after `stop`; both callables run on the event loop that is running now.

        Raises OSError where there can be no process or no socket for it.
        """
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_exit = on_message, on_exit
        self._directory = tempfile.mkdtemp(prefix="hnet-")  # mode 0700: nobody else can reach the sockets
        to_engine, from_engine = (f"ipc://{self._directory}/{name}" for name in ("to-engine", "from-engine"))
        self._context = zmq.Context()
        try:
            self._incoming = self._context.socket(zmq.PULL)
            self._incoming.set_hwm(0)
            self._incoming.bind(from_engine)
            self._outgoing = self._context.socket(zmq.PUSH)
            self._outgoing.set_hwm(0)  # a message is never dropped and sending never blocks
            self._outgoing.linger = 0
            self._outgoing.connect(to_engine)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{self._directory}: {error.strerror}") from error
        self._loop.add_reader(int(self._incoming.fd), self._drain)
        call = ChildCall(
            launch=self._launch,
            to_engine=to_engine,
            from_engine=from_engine,
            parent=os.getpid(),
            flush_seconds=self._flush_seconds,
            log_level=self._log_level,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.engine_process", msgspec.json.encode(call).decode()],
            stdin=subprocess.DEVNULL,
            env=self._child_environment(),
            start_new_session=True,  # the terminal's Ctrl-C is for the server, which ends the engine in good order
        )
        threading.Thread(target=self._watch, args=(self._process,), name="hnet-engine-watch", daemon=True).start()

    def send(self, message: FromClient) -> None:
        self._outgoing.send(_encoder.encode(message), zmq.NOBLOCK)

    async def stop(self, timeout: float) -> bool:
        """Asks the engine to end, waits up to `timeout` seconds, then kills it; frees all that was taken. True."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self.send(Shutdown())
            try:
                await asyncio.to_thread(self._process.wait, timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._context is not None:
            self._loop.remove_reader(int(self._incoming.fd))
            self._context.destroy(linger=0)
            self._context = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        return True

    def _child_environment(self) -> dict[str, str]:
        """Ours, and a path on which the child finds this very package whatever directory it starts in."""
        # Threads of a library that wait by spinning would take the cores that answer HTTP.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **self._environment}
        paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
        return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def _drain(self) -> None:
        # ZeroMQ's descriptor signals only a change, so whoever stops before the socket is empty comes back by himself.
        if self._context is None:
            return
        for _ in range(DRAIN_AT_ONCE):
            try:
                frame = self._incoming.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(self._decoder.decode(frame))
        self._loop.call_soon(self._drain)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._stopping:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(self._ended, process, code)

    def _ended(self, process: subprocess.Popen[bytes], code: int) -> None:
        if process is not self._process or self._stopping:  # another one has taken its place
            return
        self._drain()  # its last words come before the news of its end
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._loop.call_soon(self._on_exit, f"the engine's process has ended ({how})")


class ChildCall(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is told on its command line."""

    launch: EngineLaunch
    to_engine: str
    from_engine: str
    parent: int
    flush_seconds: float
    log_level: str


def run_engine_process(call: ChildCall, loading: AbstractContextManager[Progress | None]) -> int:
    """The child: runs the engine until Shutdown, a failure, or the parent's end. Returns its exit code."""
    _die_with_parent(call.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole service at once; the server drains first
    decoder = msgspec.msgpack.Decoder(FromClient)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.set_hwm(0)
    inbox.bind(call.to_engine)
    outbox = context.socket(zmq.PUSH)
    outbox.set_hwm(0)
    outbox.connect(call.from_engine)
    encoder = msgspec.msgpack.Encoder()
    sender = Sender(lambda message: outbox.send(encoder.encode(message)), call.flush_seconds)
    checked = time.monotonic()

    def receive(timeout: float) -> Sequence[FromClient]:
        nonlocal checked
        if timeout:
            inbox.poll(int(timeout * 1000))
        if time.monotonic() - checked > PARENT_CHECK_SECONDS:
            checked = time.monotonic()
            if os.getppid() != call.parent:
                return [Shutdown()]
        messages: list[FromClient] = []
        try:
            while True:
                messages.append(decoder.decode(inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return messages

    try:
        try:
            done = serve_engine(call.launch, receive, sender.put, loading)
        finally:
            sender.close()
    finally:
        context.destroy(linger=2000)  # milliseconds for the last message to leave
    return 0 if done else 1


def _die_with_parent(parent: int) -> None:
    """Linux: the kernel ends this process with its parent. Elsewhere the loop looks once a second."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the call above
        os._exit(1)


def main() -> None:
    from server.cli.loading import progress_bar

    call = msgspec.json.decode(sys.argv[1], type=ChildCall)
    logging.basicConfig(
        level=call.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    model = call.launch.arguments.get("model") or "the demo model"
    sys.exit(run_engine_process(call, progress_bar(f"loading {model}")))


if __name__ == "__main__":
    main()
