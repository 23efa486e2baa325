"""The server's side of the engine: submit requests, get what they gain, know how the engine is.

Knows messages and time; knows no HTTP, no text and no transport's inside. Everything here runs
on one event loop. A reader that is slow blocks nobody: what its requests gain meanwhile is
merged and waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Literal, Protocol

from hnet_runtime.engine.messages import (
    Abort,
    ByteLogprobs,
    Chunk,
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

EngineState = Literal["loading", "ready", "failed", "stopped"]
STOP_SECONDS = 3.0  # for an engine to end by itself before it is killed

log = logging.getLogger("hnet.engine")


class Transport(Protocol):
    """Carries messages to an engine and back; both callables are called on the event loop."""

    def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None: ...

    def send(self, message: FromClient) -> None: ...

    async def stop(self, timeout: float) -> None: ...


class Observer(Protocol):
    """Who counts: is told of every request's beginning and end and of every tick."""

    def submitted(self, request: Request, now: float) -> None: ...

    def tick(self, tick: Tick, now: float) -> None: ...

    def finished(self, request_id: str, reason: FinishReason, usage: Usage | None, now: float) -> None: ...


class EngineClient:
    """One engine, many requests. `start` begins loading; `state` says how far it is."""

    def __init__(self, transport: Transport, observer: Observer) -> None:
        self._transport = transport
        self._observer = observer
        self._streams: dict[str, OutputStream | None] = {}  # every request not known to have ended
        self._ready = asyncio.Event()
        self._heard = time.monotonic()
        self.state: EngineState = "loading"
        self.failure: str | None = None
        self.info: EngineInfo | None = None
        self.stats = EngineStats()

    def start(self) -> None:
        """Begins loading; an engine that cannot even be begun is a failure like any other."""
        try:
            self._transport.start(self._take, self._exited)
        except OSError as error:
            self._fail(f"the engine could not be started: {error}")

    async def wait_until_loaded(self) -> None:
        """Returns once the engine is ready or has failed; see `state`."""
        await self._ready.wait()

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine was last heard of."""
        return time.monotonic() - self._heard

    @property
    def num_live(self) -> int:
        """Requests submitted and not ended, running or waiting."""
        return len(self._streams)

    def submit(self, *requests: Request) -> OutputStream:
        """Hands the requests to the engine; the stream is to be closed (it is a context manager)."""
        if self.state != "ready":
            raise RuntimeError(f"the engine is {self.state}")
        stream = OutputStream(self, [request.request_id for request in requests])
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
        await self._transport.stop(STOP_SECONDS if patient else 0.0)

    def _take(self, message: FromEngine) -> None:
        now = self._heard = time.monotonic()
        match message:
            case Tick():
                self.stats = message.stats
                self._observer.tick(message, now)
                for output in message.outputs:
                    self._deliver(output, now)
            case EngineInfo():
                self.info = message
                if self.state == "loading":
                    self.state = "ready"
                self._ready.set()
            case EngineFailure():
                self._fail(message.message)

    def _deliver(self, output: Output, now: float) -> None:
        stream = self._streams.get(output.request_id)
        if output.finish_reason is not None and output.request_id in self._streams:
            del self._streams[output.request_id]
            self._observer.finished(output.request_id, output.finish_reason, output.usage, now)
        if stream is not None:
            stream.push(output)

    def _exited(self, how: str) -> None:
        if self.state in ("loading", "ready"):
            self._fail(how)

    def _fail(self, message: str) -> None:
        if self.state in ("failed", "stopped"):
            return
        if self.state == "ready":
            log.error("the engine failed with %d live requests: %s", len(self._streams), message)
        self.state, self.failure = "failed", message
        self.stats = EngineStats()
        now = time.monotonic()
        for request_id, stream in self._streams.items():
            self._observer.finished(request_id, "error", None, now)
            if stream is not None:
                stream.fail(engine_failed())
        self._streams.clear()
        self._ready.set()


class OutputStream:
    """What a group of requests gains, merged per request until it is taken.

    An async iterator of lists of Outputs, at most one Output a request in each; it ends when
    every request has ended and raises ApiError when the engine failed. Leaving it early, as a
    context manager or by `close`, aborts what still runs.
    """

    def __init__(self, client: EngineClient, request_ids: list[str]) -> None:
        self._client = client
        self._live = set(request_ids)
        self._gained: dict[str, _Gain] = {}
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._patient = False  # wake the reader only when all is there

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Aborts the requests that have not ended."""
        self._client.abort(self._live)
        self._live.clear()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come than what waits to be taken."""
        return not self._live

    def __aiter__(self) -> AsyncIterator[list[Output]]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[list[Output]]:
        while outputs := await self.take():
            yield outputs

    async def take(self, timeout: float | None = None) -> list[Output]:
        """What has been gained since the last call, waiting for it where there is nothing.

        Empty when all requests have ended, or when `timeout` seconds went by in silence.
        """
        if not self._gained and self._live and self._error is None:
            await self._wait(timeout)
        if self._error is not None:
            raise self._error
        gained, self._gained = self._gained, {}
        return [gain.output(request_id) for request_id, gain in gained.items()]

    async def until_ended(self) -> None:
        """Waits until every request has ended; `take` then gives all of it at once, or raises."""
        self._patient = True
        while self._live and self._error is None:
            await self._wait(None)

    def push(self, output: Output) -> None:
        """Adds what one request gained (called by the client)."""
        gain = self._gained.get(output.request_id)
        if gain is None:
            gain = self._gained[output.request_id] = _Gain()
        gain.add(output)
        if output.finish_reason is not None:
            self._live.discard(output.request_id)
        if not (self._patient and self._live):
            self._wake()

    def fail(self, error: ApiError) -> None:
        """Ends the stream with an error (called by the client)."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._wake)
        try:
            await self._waiter
        finally:
            if timer is not None:
                timer.cancel()
            self._waiter = None


class _Gain:
    """Outputs of one request, merged; the first one is kept as it is, for most are never merged."""

    def __init__(self) -> None:
        self._parts: list[Output] = []

    def add(self, output: Output) -> None:
        self._parts.append(output)

    def output(self, request_id: str) -> Output:
        if len(self._parts) == 1:
            return self._parts[0]
        logprobs: list[ByteLogprobs] = []
        prompt_logprobs: list[ByteLogprobs] = []
        chunks: list[Chunk] = []
        for part in self._parts:
            logprobs += part.logprobs
            prompt_logprobs += part.prompt_logprobs
            chunks += part.chunks
        last = self._parts[-1]
        return Output(
            request_id=request_id,
            data=b"".join([part.data for part in self._parts]),
            logprobs=tuple(logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
            chunks=tuple(chunks),
            opened=sum(part.opened for part in self._parts),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
            usage=last.usage,
        )
