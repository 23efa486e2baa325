"""The server's side of the engine: submit requests, get what they gain, know how the engine is.

Knows messages and time; knows no HTTP, no text and no transport's inside. Everything here runs
on one event loop. A reader that is slow blocks nobody: what its requests gain meanwhile is
merged and waits for it. An engine that has died or is silent for too long is ended and started again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, Protocol

import msgspec

from hnet_runtime.engine.messages import (
    Abort,
    EngineFailure,
    EngineInfo,
    EngineStats,
    FinishReason,
    FromClient,
    FromEngine,
    Output,
    Request,
    Submit,
    Tick,
    Usage,
)
from server.errors import ApiError, engine_failed
from server.output_stream import OutputStream, joined

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]
STOP_SECONDS = 3.0  # for an engine to end by itself before it is killed
FIRST_DELAY = 1.0  # seconds before a first restart; each one after it waits twice as long
MAX_DELAY = 60.0  # seconds; an engine that served for as long may fail anew at the first delay
LOAD_PATIENCE = 10.0  # times what the first load took, that a later one may be silent beyond the engine's timeout
WATCH_SECONDS = 1.0  # between two looks at the heartbeat, or a quarter of the timeout

log = logging.getLogger("hnet.engine")


class Transport(Protocol):
    """Carries messages to an engine and back; both callables are called on the event loop.

    After `stop` it can be started again. `stop` says whether the engine has ended.
    """

    def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None: ...

    def send(self, message: FromClient) -> None: ...

    async def stop(self, timeout: float) -> bool: ...


class Observer(Protocol):
    """Who counts: is told of every request's beginning and end, of every tick and of every engine's end.

    A tick may stand for several that came together; it has one Output a request.
    """

    def submitted(self, request: Request, now: float) -> None: ...

    def tick(self, tick: Tick, now: float) -> None: ...

    def finished(self, request_id: str, reason: FinishReason, usage: Usage | None, now: float) -> None: ...

    def engine_ended(self) -> None: ...


class EngineClient:
    """One engine at a time, many requests. `start` begins loading; `state` says how far it is.

    engine_timeout: seconds of silence after which an engine counts as wedged and is ended. max_restarts: in a row,
    each after twice the delay; None is no limit. An engine that never was ready is not started again.
    request_timeout: seconds after which requests that have not ended are aborted; None lets them run.
    """

    def __init__(
        self,
        transport: Transport,
        observer: Observer,
        *,
        engine_timeout: float = 60.0,
        max_restarts: int | None = None,
        request_timeout: float | None = None,
    ) -> None:
        self._transport = transport
        self._observer = observer
        self._engine_timeout = engine_timeout
        self._max_restarts = max_restarts
        self._request_timeout = request_timeout
        self._life = 0  # the engine's number; what an earlier one still says is not heard
        self._began = self._heard = time.monotonic()  # when the engine was started, or became ready
        self._first_load = 0.0  # seconds
        self._failures = 0  # in a row
        self._due = 0.0  # when the next restart begins
        self._watcher: asyncio.Task[None] | None = None
        self._restarter: asyncio.Task[None] | None = None
        self._streams: dict[str, OutputStream | None] = {}  # every request not known to have ended
        self._ready = asyncio.Event()
        self.restarts = 0  # begun in all
        self.state: EngineState = "loading"
        self.failure: str | None = None
        self.info: EngineInfo | None = None
        self.stats = EngineStats()

    def start(self) -> None:
        """Begins loading; an engine that cannot even be begun is a failure like any other."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        self._begin()

    def _begin(self) -> None:
        self._life += 1
        self._began = self._heard = time.monotonic()
        try:
            self._transport.start(partial(self._take, self._life), partial(self._exited, self._life))
        except (OSError, RuntimeError) as error:  # no process, socket or thread to be had
            self._fail(f"the engine could not be started: {error}")

    async def wait_until_loaded(self) -> None:
        """Returns once the engine is ready or has failed; see `state`."""
        await self._ready.wait()

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine was last heard of; of one that has failed or loads, since that began."""
        return time.monotonic() - self._heard

    @property
    def seconds_to_restart(self) -> float:
        """Until a restarting engine is expected to be ready; infinite where none is coming back."""
        if self.state != "restarting":
            return math.inf
        return max(0.0, self._due - time.monotonic()) + self._first_load

    @property
    def num_live(self) -> int:
        """Requests submitted and not ended, running or waiting."""
        return len(self._streams)

    def submit(self, *requests: Request) -> OutputStream:
        """Hands the requests to the engine; the stream is to be closed (it is a context manager)."""
        if self.state != "ready":
            raise RuntimeError(f"the engine is {self.state}")
        stream = OutputStream(self.abort, [request.request_id for request in requests])
        if self._request_timeout is not None:
            stream.expire_in(self._request_timeout)
        now = time.monotonic()
        for request in requests:
            if request.request_id in self._streams:
                raise ValueError(f"request id {request.request_id!r} is in use")
            self._streams[request.request_id] = stream
            self._observer.submitted(request, now)
            self._transport.send(Submit(request=request))
        return stream

    def abort(self, request_ids: Iterable[str]) -> None:
        """Frees the rows of requests nobody listens to any more; those that have ended are let be."""
        for request_id in request_ids:
            if self._streams.get(request_id) is not None:
                self._streams[request_id] = None
                self._transport.send(Abort(request_id=request_id))

    def fail_live(self, error: ApiError) -> None:
        """Ends every open stream with `error` and frees its rows."""
        for stream in {stream for stream in self._streams.values() if stream is not None}:
            stream.fail(error)
            stream.close()

    async def stop(self) -> None:
        """Ends the engine; one that is still loading, or does not answer, is not waited for."""
        patient = self.state == "ready"
        self.state = "stopped"
        self._ready.set()
        tasks = [task for task in (self._watcher, self._restarter) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.stop(STOP_SECONDS if patient else 0.0)

    def _take(self, life: int, message: FromEngine) -> None:
        if life != self._life:
            return
        now = self._heard = time.monotonic()
        match message:
            case Tick():
                self.stats = message.stats
                tick = msgspec.structs.replace(message, outputs=tuple(joined(message.outputs)))
                self._observer.tick(tick, now)
                for output in tick.outputs:
                    self._deliver(output, now)
            case EngineInfo():
                self._loaded(message, now)
            case EngineFailure():
                self._fail(message.message)

    def _deliver(self, output: Output, now: float) -> None:
        stream = self._streams.get(output.request_id)
        if output.finish_reason is not None and output.request_id in self._streams:
            del self._streams[output.request_id]
            self._observer.finished(output.request_id, output.finish_reason, output.usage, now)
        if stream is not None:
            stream.push(output)

    def _loaded(self, info: EngineInfo, now: float) -> None:
        if self.info is None:
            self._first_load = now - self._began
        self.info = info
        self._began = now
        if self.state == "restarting":
            log.warning("the engine serves again")
        if self.state in ("loading", "restarting"):
            self.state, self.failure = "ready", None
        self._ready.set()

    def _exited(self, life: int, how: str) -> None:
        if life == self._life:
            self._fail(how)

    def _fail(self, message: str) -> None:
        """Ends what the engine worked on and sees to its restart; what it still says is not heard."""
        if self.state in ("failed", "stopped"):
            return
        now = time.monotonic()
        self._life += 1
        if self.state == "ready":
            log.error("the engine failed with %d live requests: %s", len(self._streams), message)
            if self._heard - self._began >= MAX_DELAY:
                self._failures = 0
        self._failures += 1
        self._heard = now
        self.failure = message
        self.stats = EngineStats()
        self._observer.engine_ended()
        is_last = self._max_restarts is not None and self._failures > self._max_restarts
        self.state = "failed" if self.info is None or is_last else "restarting"
        if self.info is not None:
            delay = min(MAX_DELAY, FIRST_DELAY * 2 ** min(self._failures - 1, 30))
            self._due = now + delay
            self._restarter = asyncio.get_running_loop().create_task(self._end_and_restart(delay))
        for request_id, stream in self._streams.items():
            self._observer.finished(request_id, "error", None, now)
            if stream is not None:
                stream.fail(engine_failed())
        self._streams.clear()
        self._ready.set()

    async def _end_and_restart(self, delay: float) -> None:
        if not await self._transport.stop(0.0):
            self.state = "failed"
            log.error("the engine cannot be ended, so it is not started again")
        if self.state == "failed":
            return
        log.warning("the engine is started again in %g s", delay)
        await asyncio.sleep(self._due - time.monotonic())
        self.restarts += 1
        self._begin()

    async def _watch(self) -> None:
        """Looks whether the engine is still heard of; what it does not say in time ends it."""
        pause = min(WATCH_SECONDS, self._engine_timeout / 4)
        while True:
            await asyncio.sleep(pause)
            if self._is_wedged():
                await asyncio.sleep(pause)  # it may be us who stood still: what has come meanwhile is read first
                if self._is_wedged():
                    self._fail(f"the engine has been silent for {self.heartbeat_age:.1f} s")

    def _is_wedged(self) -> bool:
        if self.state == "ready":
            return self.heartbeat_age > self._engine_timeout
        loads_again = self.state == "restarting" and time.monotonic() > self._due
        return loads_again and self.heartbeat_age > self._engine_timeout + LOAD_PATIENCE * self._first_load
