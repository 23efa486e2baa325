"""What requests gain on its way to whoever reads it, merged while nobody does.

Knows messages and time; no engine, no HTTP and no text. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from hnet_runtime.engine.messages import ByteLogprobs, Chunk, Output
from server.errors import ApiError, request_timeout


class OutputStream:
    """What a group of requests gains, merged per request until it is taken.

    An async iterator of lists of Outputs, at most one Output a request in each; it ends when
    every request has ended, and raises ApiError, after what was gained before, when the engine failed or time is up.
    Leaving it early, as a context manager or by `close`, aborts what still runs.
    """

    def __init__(self, abort: Callable[[Iterable[str]], None], request_ids: list[str]) -> None:
        self._abort = abort
        self._live = set(request_ids)
        self._gained: dict[str, _Gain] = {}
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._patient = False  # wake the reader only when all is there
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Aborts the requests that have not ended."""
        self._cancel_timer()
        self._abort(self._live)
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
        if self._error is not None and not self._gained:
            raise self._error
        gained, self._gained = self._gained, {}
        return [gain.output(request_id) for request_id, gain in gained.items()]

    async def until_ended(self) -> None:
        """Waits until every request has ended; `take` then gives all of it at once. Raises as `take` does."""
        self._patient = True
        while self._live and self._error is None:
            await self._wait(None)
        if self._error is not None:
            raise self._error

    def push(self, output: Output) -> None:
        """Adds what one request gained (called by the client)."""
        gain = self._gained.get(output.request_id)
        if gain is None:
            gain = self._gained[output.request_id] = _Gain()
        gain.add(output)
        if output.finish_reason is not None:
            self._live.discard(output.request_id)
            if not self._live:
                self._cancel_timer()
        if not (self._patient and self._live):
            self._wake()

    def fail(self, error: ApiError) -> None:
        """Ends the stream with an error (called by the client)."""
        self._error = self._error or error
        self._cancel_timer()
        self._wake()

    def expire_in(self, seconds: float) -> None:
        """Ends the stream and frees its rows unless it has ended by then (called by the client)."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self.fail(request_timeout(seconds))
        self.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
