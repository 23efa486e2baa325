"""Who runs next: admission, parking, preemption, and each tick's plan. Knows requests, rows and pages; no tensors.

Computed catches up with known: a request in the batch has bytes that the model has not seen (a prompt's, or the newest
of its completion), or has one that waits before a stage; a plan gives them their turn.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hnet_runtime.engine.memory import RowMemory
from hnet_runtime.engine.plan import ByteStep, Plan, Prefill, Span, StageStep, Work
from hnet_runtime.engine.policies import Fire, Lane, Policy, Situation, Through
from hnet_runtime.engine.request import LiveRequest, RequestError
from hnet_runtime.engine.snapshots import Snapshot
from hnet_runtime.state.rows import PAGE

_LEARNING, _EVERY = 256, 4  # ticks of which the policy is told, and one in so many afterwards: to be told takes time
_NOBODY_WAITS = 8  # times the bytes of prompts a tick runs while no row decodes
_WORTH = 32  # bytes that a snapshot must save to be taken, or waited for


@dataclass(frozen=True)
class PrefillRules:
    """How prompts share a tick with rows that decode.

    bytes_per_tick: most bytes of prompts in a tick, eight times as many while no row decodes; share: of the time, that
    prompts may take beside decoding rows; interval: bytes between a prompt's snapshots, None for none between.
    """

    bytes_per_tick: int = 64
    share: float = 0.5
    interval: int | None = None


class Scheduler:
    """First come, first served among requests of one priority; those of a lower number go before. A request is
    admitted when a row is free and pages are for its prompt, as prompts chunked so far; where pages run out later, the
    last in that order gives up its row and comes back before whoever has not begun, but for those of a lower number.

    A request whose prompt begins as one that is being read right now waits for a snapshot of what they share.
    """

    def __init__(self, memory: RowMemory, policy: Policy, num_stages: int, rules: PrefillRules | None = None) -> None:
        self._memory, self._policy = memory, policy
        self._last = num_stages - 1
        self._rules = rules or PrefillRules()
        self._waiting: deque[LiveRequest] = deque()  # by LiveRequest.order
        self._swapped: list[LiveRequest] = []  # by LiveRequest.order
        self._live: dict[int, LiveRequest] = {}
        self._by_id: dict[str, LiveRequest] = {}
        # By stage: rows that wait for it, in order of parking. Nobody parks at stage 0.
        self._lanes: list[dict[int, LiveRequest]] = [{} for _ in range(num_stages)]
        self._positions = [64] * num_stages  # run so far; at first every byte is taken for a chunk
        self._arrivals = 0
        self._tick = 0
        self.listens = False  # whether the policy is to be told of the tick that was planned last
        self._slack = 0  # ticks for which every decoding row is known to have pages
        self._prompt_debt = 0.0  # seconds of prefill that decoding rows have not been given back
        self.num_preemptions = 0
        self.num_queried_bytes = 0
        self.num_hit_bytes = 0

    def __getitem__(self, row: int) -> LiveRequest:
        return self._live[row]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def live(self) -> Iterator[LiveRequest]:
        """Requests that have a row, in no stated order."""
        return iter(tuple(self._live.values()))

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        """Requests without a row: not begun, or preempted."""
        return len(self._waiting) + len(self._swapped)

    @property
    def num_parked(self) -> tuple[int, ...]:
        """Rows that wait for stage 1, 2, …"""
        return tuple(len(lane) for lane in self._lanes[1:])

    @property
    def kv_in_use(self) -> float:
        """Share of the scarcest stage's KV pages that rows own, 0–1."""
        return self._memory.kv_in_use

    @property
    def cached_bytes(self) -> int:
        return self._memory.cached_bytes

    def enqueue(self, request: LiveRequest) -> None:
        """Raises RequestError where the request could never run to its end, or its id is taken."""
        if request.request_id in self._by_id:
            raise RequestError("request_id", f"request_id {request.request_id!r} is in use")
        most = self._memory.most_positions
        if most is not None and request.max_positions > most:
            raise RequestError(
                "max_tokens",
                f"prompt and max_tokens may take {request.max_positions} KV positions; "
                f"the memory set aside holds {most // PAGE} pages of {PAGE}",
            )
        self._arrivals += 1
        request.arrival = self._arrivals
        if self._waiting and self._waiting[-1].order > request.order:
            insort(self._waiting, request, key=_order)
        else:
            self._waiting.append(request)
        self._by_id[request.request_id] = request

    # ── who has a row ─────────────────────────────────────────────────────────────────────────────

    def admit(self, now: float) -> list[tuple[LiveRequest, Any]]:
        """Gives rows to who was preempted and to who waits, each in order: of one priority to the preempted first.

        Returns those whose whole prompt was known, with the logits [V] after it.
        """
        ready: list[tuple[LiveRequest, Any]] = []
        passed: list[LiveRequest] = []
        while self._memory.num_free_rows and (self._swapped or self._waiting):
            if self._swapped and not self._is_overtaken(self._swapped[0]):
                if not self._resume(self._swapped[0], now):
                    break
                del self._swapped[0]
                continue
            request = self._waiting[0]
            if self._follows(request):
                passed.append(self._waiting.popleft())  # whoever is behind need not wait for that
                continue
            admitted, snapshot = self._begin(request, now)
            if not admitted:
                break
            self._waiting.popleft()
            if snapshot is not None and not request.is_prefilling:
                ready.append((request, snapshot.logits))
        self._waiting.extendleft(reversed(passed))
        return ready

    def _is_overtaken(self, preempted: LiveRequest) -> bool:
        """Whether the first who waits goes before one who was preempted."""
        return bool(self._waiting) and self._waiting[0].request.priority < preempted.request.priority

    def _resume(self, request: LiveRequest, now: float) -> bool:
        positions = request.swapped.positions
        if self._live and not self._memory.has_room(positions, len(self._live) + 1):
            return False
        row = self._memory.swap_in(request.swapped)
        if row is None:
            return False
        self._slack = 0
        request.swap_in(row, self._tick, now)
        self._live[row] = request
        if request.due:
            self._lanes[request.due][row] = request
        return True

    def _begin(self, request: LiveRequest, now: float) -> tuple[bool, Snapshot | None]:
        """Whether the request could be given a row, and the snapshot it begins from."""
        prompt, salt = request.request.prompt, request.request.cache_salt
        snapshot = self._best_snapshot(request)
        known = 0 if snapshot is None else snapshot.length
        expected = None
        if self._live:
            # As bytes chunk on the whole, and a page more for each who runs; nothing is promised.
            expected = [(len(prompt) - known) * count // self._positions[0] for count in self._positions]
        row = self._memory.begin(snapshot, expected, spare=len(self._live) + 1)
        if row is None:
            return False, None
        if request.pinned is not None:
            self._memory.unpin(request.pinned)
            request.pinned = None
        request.admit(row, now, snapshot)
        self._live[row] = request
        self._slack = 0
        if request.reads_cache:
            self.num_queried_bytes += len(prompt)
            self.num_hit_bytes += known
        if self._memory.caches:
            branch = self._memory.shared(salt, prompt)
            if known + _WORTH <= branch < len(prompt):
                request.want_snapshot(branch)
        return True, snapshot

    def _best_snapshot(self, request: LiveRequest) -> Snapshot | None:
        if not request.reads_cache:
            return None
        found = self._memory.find(request.request.cache_salt, request.request.prompt)
        pinned = None if request.pinned is None else request.pinned.snapshot
        if pinned is not None and (found is None or found.length < pinned.length):
            return pinned
        return found

    def _follows(self, request: LiveRequest) -> bool:
        """Whether somebody is reading bytes that this request's prompt begins with, and will hand on their state."""
        if request.leader is not None:
            leader, length = request.leader
            if leader.row is not None and leader.fed < length:
                return True
            request.leader = None
        if request.pinned is not None or not request.reads_cache:
            return False
        prompt, salt = request.request.prompt, request.request.cache_salt
        best: LiveRequest | None = None
        longest = 0
        for other in self._live.values():
            if not other.is_prefilling or other.request.cache_salt != salt:
                continue
            length = _num_common(prompt, other.request.prompt)
            # The choices of one prompt share its reading even where nothing is cached.
            is_worth = prompt == other.request.prompt or (self._memory.caches and length >= _WORTH)
            if is_worth and length > max(longest, other.fed):
                best, longest = other, length
        if best is None:
            return False
        found = self._memory.find(salt, prompt)
        if found is not None and longest - found.length < _WORTH:
            return False
        best.want_snapshot(longest)
        best.followers.setdefault(longest, []).append(request)
        request.leader = best, longest
        return True

    def reached(self, request: LiveRequest, logits: Any) -> None:
        """A prompt has been read as far as a snapshot is wanted; logits: [V] after its last byte."""
        assert request.row is not None
        waiting = [each for each in request.followers.pop(request.fed, ()) if each.leader == (request, request.fed)]
        if waiting or (self._memory.caches and request.fed >= _WORTH):
            self._keep(request, request.request.prompt[: request.fed], logits, waiting)

    def ended(self, request: LiveRequest, length: int) -> None:
        """A request has finished, its row at rest after `length` bytes: what it wrote is a prefix for the next turn."""
        if self._memory.caches and length >= _WORTH:
            self._keep(request, request.sequence(length), request.last_logits, [])

    def _keep(self, request: LiveRequest, data: bytes, logits: Any, waiting: Sequence[LiveRequest]) -> None:
        assert request.row is not None
        salt, chunks = request.request.cache_salt, request.history.copy()
        pinned = self._memory.keep(request.row, salt, data, chunks, logits, len(waiting))
        for follower in waiting:
            follower.leader, follower.pinned = None, pinned

    def cancel(self, request_id: str) -> LiveRequest | None:
        """Takes a request out, wherever it is; None if it is not here (it may have just finished)."""
        request = self._by_id.get(request_id)
        if request is None:
            return None
        if request.swapped is not None:
            self._swapped.remove(request)
        elif request.row is None:
            self._waiting.remove(request)
        self.release(request)
        return request

    def release(self, request: LiveRequest) -> None:
        """Frees the row and pages of a request that is over."""
        del self._by_id[request.request_id]
        request.leader = None
        if request.pinned is not None:
            self._memory.unpin(request.pinned)
            request.pinned = None
        if request.row is not None:
            self._memory.leave(request.row)
            self._take_off(request)
            request.row = None

    def _take_off(self, request: LiveRequest) -> None:
        assert request.row is not None
        del self._live[request.row]
        self._lanes[request.due].pop(request.row, None)

    # ── what runs ─────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> Plan:
        """What one tick runs. Rows that it gives pages to may have them from others, who are preempted."""
        self._tick += 1
        self.listens = False
        work: list[Work] = []
        runnable = [
            row
            for row, request in self._live.items()
            if not request.due and not request.is_prefilling and request.held is None
        ]
        prompts = [request for request in self._live.values() if request.is_prefilling]
        decoding = bool(runnable) or any(self._lanes)
        if decoding:
            step = self._step(runnable, len(prompts), now)
            work += [step] if step.rows else []
        if prompts and not (decoding and self._prompt_debt > 0):
            budget = self._rules.bytes_per_tick * (1 if decoding else _NOBODY_WAITS)
            spans = tuple(self._spans([each for each in prompts if each.row is not None], budget, now))
            # Who gave up its row for a prompt's pages steps no more.
            work = [step for step in map(self._still_live, work) if step.rows]
            work += [Prefill(spans)] if spans else []
        return Plan(tuple(work))

    def goes_on(self) -> list[LiveRequest]:
        """Who runs one byte more, through every stage, in the tick that follows the one under way, but for those who
        are over by then; nobody where that is not known before this one has brought anything. To ask changes nothing.

        It is known where nobody could be given a row, waits for a stage or has a prompt to read, all have pages, and
        the policy has them go through.
        """
        going = [request for request in self._live.values() if request.finish_reason is None]
        if not going or self._slack <= 0 or any(self._lanes) or (self.num_waiting and self._memory.num_free_rows):
            return []
        if not all(request.draws_plainly and not request.is_prefilling for request in going):
            return []
        if len(going) > 1 and not self._policy.goes_through(self._situation(len(going))):
            return []
        return sorted(going, key=_row)

    def went_on(self, num_rows: int) -> None:
        """So many of those who go on have been given their next tick: it counts as one that was planned."""
        self._tick += 1
        self._slack -= 1
        self.listens = self._is_to_listen(num_rows == 1)
        if num_rows > 1:
            self._policy.choose(self._situation(num_rows))

    def _situation(self, num_runnable: int, num_prompts: int = 0, now: float = 0.0) -> Situation:
        return Situation(num_runnable, tuple(self._open_lanes(now)), num_prompts)

    def _is_to_listen(self, is_lone: bool) -> bool:
        return not is_lone and (self._tick < _LEARNING or self._tick % _EVERY == 0)

    def _open_lanes(self, now: float) -> Iterator[Lane]:
        for stage, lane in enumerate(self._lanes[1:], start=1):
            oldest = next(iter(lane.values()), None)
            ages = (0, 0.0) if oldest is None else (self._tick - 1 - oldest.parked_tick, now - oldest.parked_at)
            yield Lane(stage, len(lane), *ages)

    def _step(self, runnable: list[int], num_prompts: int, now: float) -> ByteStep | StageStep:
        is_lone = len(runnable) == 1 and not any(self._lanes)
        self.listens = self._is_to_listen(is_lone)
        if is_lone:  # whatever the policy
            return ByteStep(self._with_pages(runnable, 0, self._last, now))
        decision = self._policy.choose(self._situation(len(runnable), num_prompts, now))
        if isinstance(decision, Fire):
            stage, through = decision.stage, decision.through
            rows = self._with_pages(list(self._lanes[stage]), stage, self._last if through else stage, now)
            return StageStep(stage, rows, through)
        through = isinstance(decision, Through)
        return ByteStep(self._with_pages(runnable, 0, self._last if through else 0, now), through)

    def _with_pages(self, rows: list[int], first: int, last: int, now: float) -> tuple[int, ...]:
        """Those rows that have a page for their next position, or could be given one: in order, since neighbours in
        memory step together."""
        if self._slack > 0:
            self._slack -= 1  # a tick runs at most one position of a row in each stage
            return tuple(sorted(rows))
        lacking = self._memory.lacking(rows, first, last)
        for request in sorted((self._live[row] for row in lacking), key=_order):
            while request.row is not None and not self._memory.grow(request.row, first, last, 1):
                self._preempt(now)
        decoding = [row for row, request in self._live.items() if not request.is_prefilling]
        self._slack = self._memory.slack(decoding) - 1
        # A row that was given up has gone to nobody else meanwhile: rows are given in `admit` alone.
        return tuple(sorted(row for row in rows if row in self._live))

    def _preempt(self, now: float) -> None:
        """The last in order gives up its row."""
        victim = max(self._live.values(), key=_order)
        assert victim.row is not None
        row = victim.row
        self._take_off(victim)
        victim.swap_out(self._memory.swap_out(row), now)
        self._swapped.append(victim)
        self._swapped.sort(key=_order)
        self.num_preemptions += 1

    def _still_live(self, step: Work) -> ByteStep | StageStep:
        assert not isinstance(step, Prefill)
        rows = tuple(row for row in step.rows if row in self._live)
        if isinstance(step, ByteStep):
            return ByteStep(rows, step.through)
        return StageStep(step.stage, rows, step.through)

    def _spans(self, prompts: list[LiveRequest], budget: int, now: float) -> Iterator[Span]:
        """Shares the tick's bytes: everyone the same, and what short prompts leave goes to the others."""
        # Where there are more prompts than bytes, the first in order go: they do not wait for ever.
        prompts = sorted(prompts, key=_order)[:budget]
        interval = self._rules.interval if self._memory.caches else None
        wanted = {request: request.next_snapshot(interval) - request.fed for request in prompts}
        shortest_first = sorted(prompts, key=wanted.__getitem__)
        spans: list[tuple[LiveRequest, int]] = []
        for index, request in enumerate(shortest_first):
            share = min(wanted[request], budget // (len(shortest_first) - index))
            share = self._with_pages_for(request, share, now) if share else 0
            if share:
                budget -= share
                spans.append((request, share))
        for request, share in spans:
            if request.row is not None:  # it may have had to make room for one before it
                end = request.fed + share
                yield Span(
                    request.row,
                    request.fed,
                    end,
                    completes=end == request.known,
                    snapshot=share == wanted[request] and request.is_reading,
                )

    def _with_pages_for(self, request: LiveRequest, share: int, now: float) -> int:
        """How many of its next bytes a prompt can run, were each a chunk in every stage; 0 if it lost its row."""
        while request.row is not None:
            room = self._memory.grow(request.row, 0, self._last, share)
            if room:
                return room
            self._preempt(now)
        return 0

    # ── what ran ──────────────────────────────────────────────────────────────────────────────────

    def read(self, request: LiveRequest) -> None:
        """A piece of its prompt has run: pages that turned out not to be needed go back."""
        assert request.row is not None
        self._memory.trim(request.row)
        self._slack = 0

    def park(self, request: LiveRequest, stage: int, now: float) -> None:
        """Its newest byte waits for `stage`."""
        assert request.row is not None
        request.park(stage, self._tick, now)
        self._lanes[stage][request.row] = request

    def unpark(self, request: LiveRequest, now: float) -> float:
        """A row that waited was taken up; returns the seconds it waited."""
        assert request.row is not None
        del self._lanes[request.due][request.row]
        return request.unpark(now)

    @property
    def policy(self) -> Policy:
        """Who is to be told what a tick cost and what routers said in it, where `listens`."""
        return self._policy

    def ran(self, stage: int, positions: int) -> None:
        """So many positions of a stage have run, of prompts or completions."""
        self._positions[stage] += positions

    def spent(self, decoding: float, prefilling: float) -> None:
        """Seconds a tick spent on rows that decode, and on prompts beside them."""
        share = self._rules.share
        if share >= 1 or not decoding:
            self._prompt_debt = 0.0
        else:
            self._prompt_debt = max(self._prompt_debt + prefilling * (1 - share) / share - decoding, 0.0)

    def check(self) -> None:
        """Conservation: every row and page is free, cached, or owned by live requests. Raises AssertionError."""
        self._memory.check(list(self._live))
        assert len(self._by_id) == len(self._live) + self.num_waiting, "requests leaked"
        for stage, lane in enumerate(self._lanes):
            assert all(request.due == stage and self._live.get(row) is request for row, request in lane.items())
        parked = sum(1 for request in self._live.values() if request.due)
        assert parked == sum(self.num_parked), "parked requests leaked"


def _order(request: LiveRequest) -> tuple[int, int]:
    return request.order


def _row(request: LiveRequest) -> int:
    assert request.row is not None
    return request.row


def _num_common(one: bytes, other: bytes) -> int:
    """How many leading bytes are the same."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length - 1
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
