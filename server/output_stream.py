"""What requests gain on its way to whoever reads it, merged while nobody does.

Knows messages and time; no engine, no HTTP and no text. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from hnet_runtime.engine.messages import Output
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
        self._gained: list[Output] = []
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

    async def take(self) -> list[Output]:
        """What has been gained since the last call, waiting for it where there is nothing; empty at the end."""
        if not self._gained and self._live and self._error is None:
            await self._wait()
        if self._error is not None and not self._gained:
            raise self._error
        gained, self._gained = self._gained, []
        return joined(gained) if len(gained) > 1 else gained

    async def until_ended(self) -> None:
        """Waits until every request has ended; `take` then gives all of it at once. Raises as `take` does."""
        self._patient = True
        while self._live and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    def push(self, output: Output) -> None:
        """Adds what one request gained (called by the client)."""
        self._gained.append(output)
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

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def joined(outputs: Iterable[Output]) -> list[Output]:
    """One Output a request, with all that those of the request say."""
    parts: dict[str, list[Output]] = {}
    for output in outputs:
        parts.setdefault(output.request_id, []).append(output)
    return [_one(same) for same in parts.values()]


def _one(parts: Sequence[Output]) -> Output:
    last = parts[-1]
    if len(parts) == 1:
        return last
    return Output(
        request_id=last.request_id,
        data=b"".join([part.data for part in parts]),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        prompt_logprobs=tuple(entry for part in parts for entry in part.prompt_logprobs),
        chunks=tuple(chunk for part in parts for chunk in part.chunks),
        opened=sum(part.opened for part in parts),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        usage=last.usage,
    )
