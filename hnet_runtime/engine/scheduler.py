"""Who runs next: admission, and each tick's plan. Knows requests, rows and pages; no tensors.

Computed catches up with known: a request in the batch has bytes that the model has not seen (a
prompt's, or the newest of its completion), and a plan gives each of them its turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from hnet_runtime.engine.plan import ByteStep, Plan, Prefill, Span, Work
from hnet_runtime.engine.request import LiveRequest, RequestError
from hnet_runtime.state.rows import PagePool, RowPool, pages_for

_NOBODY_WAITS = 8  # times the bytes of prompts a tick runs while no row decodes


class Scheduler:
    """First come, first served. A request is admitted when a row and the KV pages of its longest possible
    course are free: one chunk per byte in every stage, since odd input does that.

    prefill_bytes: bytes of prompts that one tick runs at most, shared evenly between the prompts, while other rows
        decode and wait for it; eight times as many while none does.
    """

    def __init__(self, rows: RowPool, pages: Sequence[PagePool], prefill_bytes: int) -> None:
        self._rows, self._pages = rows, tuple(pages)
        self._prefill_bytes = prefill_bytes
        self._waiting: deque[LiveRequest] = deque()
        self._live: dict[int, LiveRequest] = {}
        self._by_id: dict[str, LiveRequest] = {}

    def __getitem__(self, row: int) -> LiveRequest:
        return self._live[row]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def live(self) -> Iterator[LiveRequest]:
        """Requests that have a row, oldest first."""
        return iter(tuple(self._live.values()))

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_in_use(self) -> float:
        """Share of the scarcest stage's KV pages that is reserved, 0–1."""
        return max((1 - pool.num_free / pool.num_pages for pool in self._pages), default=0.0)

    def enqueue(self, request: LiveRequest) -> None:
        """Raises RequestError where the request could never be admitted, or its id is taken."""
        if request.request_id in self._by_id:
            raise RequestError("request_id", f"request_id {request.request_id!r} is in use")
        for pool in self._pages:
            if pages_for(request.max_positions) > pool.num_pages:
                raise RequestError(
                    "max_tokens",
                    f"prompt and max_tokens may take {request.max_positions} KV positions; "
                    f"the memory set aside holds {pool.num_pages} pages of 64",
                )
        self._waiting.append(request)
        self._by_id[request.request_id] = request

    def admit(self, now: float) -> list[int]:
        """Gives rows and pages to waiting requests in order of arrival; returns the new rows."""
        admitted = []
        while self._waiting and self._rows.num_free:
            request = self._waiting[0]
            if not all(pool.can_reserve(request.max_positions) for pool in self._pages):
                break
            self._waiting.popleft()
            row = self._rows.allocate()
            for pool in self._pages:
                pool.reserve(row, request.max_positions)
            request.admit(row, now)
            self._live[row] = request
            admitted.append(row)
        return admitted

    def plan(self) -> Plan:
        work: list[Work] = []
        # In order of rows: neighbours in memory step together.
        decoding = tuple(sorted(row for row, request in self._live.items() if not request.is_prefilling))
        if decoding:
            work.append(ByteStep(decoding))
        prompts = [request for request in self._live.values() if request.is_prefilling]
        spans = tuple(self._spans(prompts, self._prefill_bytes * (1 if decoding else _NOBODY_WAITS)))
        if spans:
            work.append(Prefill(spans))
        return Plan(tuple(work))

    def _spans(self, prompts: list[LiveRequest], budget: int) -> Iterator[Span]:
        """Shares the tick's bytes: everyone the same, and what short prompts leave goes to the others."""
        # Where there are more prompts than bytes, the oldest ones go: nobody who came first waits for ever.
        shortest_first = sorted(prompts[:budget], key=lambda request: len(request.request.prompt) - request.fed)
        for index, request in enumerate(shortest_first):
            assert request.row is not None
            left = len(request.request.prompt) - request.fed
            share = min(left, budget // (len(shortest_first) - index))
            if share:
                budget -= share
                yield Span(request.row, request.fed, request.fed + share, completes=share == left)

    def cancel(self, request_id: str) -> LiveRequest | None:
        """Takes a request out, wherever it is; None if it is not here (it may have just finished)."""
        request = self._by_id.get(request_id)
        if request is None:
            return None
        if request.row is None:
            self._waiting.remove(request)
        self.release(request)
        return request

    def release(self, request: LiveRequest) -> None:
        """Frees the row and pages of a request that is over."""
        del self._by_id[request.request_id]
        if request.row is not None:
            del self._live[request.row]
            self._rows.free(request.row)
            for pool in self._pages:
                pool.free(request.row)

    def check(self) -> None:
        """Conservation: every row and page is free or owned by one live request. Raises AssertionError."""
        self._rows.check()
        for pool in self._pages:
            pool.check(list(self._live))
        assert len(self._by_id) == len(self._live) + len(self._waiting), "requests leaked"
