"""What is counted about requests and ticks, as plain numbers on the event loop.

Counting is on the path of every byte, so it is additions and nothing else; names, labels and
the text format are `server.exposition`'s, which reads these numbers when somebody asks.
One "request" here is one of the engine's: a choice of a prompt. Its end goes into the request log as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from hnet_runtime.engine.messages import EngineStats, FinishReason, Request, Tick, Usage
from server.admission import Backlog
from server.request_log import log_finished, trace_id

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
BYTES = tuple(float(1 << power) for power in range(0, 21, 1))
BYTES_PER_CHUNK = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 64.0)
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")


class Histogram:
    """Counts of values by bucket; a bucket holds what is at most its bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += value * weight

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values at most that) as Prometheus has them, `+Inf` last."""
        total, rows = 0, []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class _Live:
    """Times of one request that runs."""

    __slots__ = ("chunk", "first", "last", "num_bytes", "prompt_bytes", "submitted", "trace")

    def __init__(self, submitted: float, prompt_bytes: int) -> None:
        self.submitted = submitted
        self.prompt_bytes = prompt_bytes
        self.first = 0.0
        self.last = 0.0
        self.chunk = 0.0  # when the completion's newest chunk was opened; 0 before its first
        self.num_bytes = 0
        self.trace = trace_id.get()


class Metrics:
    """Told by the engine's client of every request and tick (see `engine_client.Observer`)."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._live: dict[str, _Live] = {}
        self._last = EngineStats()  # the engine's
        self._base = EngineStats()  # what all engines before it had done: totals never fall
        self.finished_by_reason: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.steps: Counter[tuple[str, int]] = Counter()
        self.step_rows: Counter[tuple[str, int]] = Counter()
        self.graph_replays: Counter[tuple[str, int, str]] = Counter()  # by kind, rows and mode
        self.step_duration: defaultdict[tuple[str, int], Histogram] = defaultdict(lambda: Histogram(SECONDS))
        self.park_wait: defaultdict[int, Histogram] = defaultdict(lambda: Histogram(SECONDS))
        self.bytes_per_chunk: defaultdict[int, Histogram] = defaultdict(lambda: Histogram(BYTES_PER_CHUNK))
        self.time_to_first_byte = Histogram(SECONDS)
        self.inter_byte_latency = Histogram(SECONDS)
        self.inter_chunk_latency = Histogram(SECONDS)
        self.time_per_output_byte = Histogram(SECONDS)
        self.e2e_latency = Histogram(SECONDS)
        self.queue_time = Histogram(SECONDS)
        self.prefill_time = Histogram(SECONDS)
        self.decode_time = Histogram(SECONDS)
        self.prompt_bytes = Histogram(BYTES)
        self.generation_bytes = Histogram(BYTES)

    @property
    def totals(self) -> EngineStats:
        """What all engines together have done; only the counts that end in `_total` mean anything."""
        return added(self._base, self._last)

    def submitted(self, request: Request, now: float) -> None:
        self._live[request.request_id] = _Live(now, len(request.prompt))
        # The choices of a prompt read it once.
        unread = len(request.prompt) if request.params.choice == 0 else 0
        self._backlog.add(request.request_id, unread, request.params.max_tokens)

    def tick(self, tick: Tick, now: float) -> None:
        stats = self._last = tick.stats
        base = self._base
        self._backlog.progress(
            base.prompt_bytes_total + stats.prompt_bytes_total,
            base.generation_bytes_total + stats.generation_bytes_total,
            now,
        )
        for step in stats.steps:
            key = (step.kind, step.stage)
            self.steps[key] += 1
            self.step_rows[key] += step.rows
            self.step_duration[key].observe(step.seconds)
        for replay in stats.replays:
            self.graph_replays[replay.kind, replay.bucket, replay.mode] += replay.count
        for stage, seconds in stats.park_waits:
            self.park_wait[stage].observe(seconds)
        for output in tick.outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue
            if output.opened:
                if live.chunk:
                    self.inter_chunk_latency.observe((now - live.chunk) / output.opened, output.opened)
                else:
                    self.inter_chunk_latency.observe(0.0, output.opened - 1)
                live.chunk = now
            if not output.data:
                continue
            gained = len(output.data)
            if live.num_bytes == 0:
                live.first = now
                self._backlog.has_read(output.request_id)
                self.time_to_first_byte.observe(now - live.submitted)
                self.inter_byte_latency.observe(0.0, gained - 1)  # what comes with the first comes no later than it
            else:
                self.inter_byte_latency.observe((now - live.last) / gained, gained)
            live.num_bytes += gained
            live.last = now

    def finished(self, request_id: str, reason: FinishReason, usage: Usage | None, now: float) -> None:
        live = self._live.pop(request_id)
        self._backlog.remove(request_id)
        self.finished_by_reason[reason] += 1
        self.e2e_latency.observe(now - live.submitted)
        self.prompt_bytes.observe(live.prompt_bytes)
        self.generation_bytes.observe(live.num_bytes)
        if live.num_bytes > 1:
            self.time_per_output_byte.observe((live.last - live.first) / (live.num_bytes - 1))
        if usage is not None:
            self.queue_time.observe(usage.queue_seconds)
            self.prefill_time.observe(usage.prefill_seconds)
            self.decode_time.observe(usage.decode_seconds)
            for stage, chunks in enumerate(usage.chunks, start=1):
                if chunks:
                    self.bytes_per_chunk[stage].observe((usage.prompt_bytes + usage.completion_bytes) / chunks)
        log_finished(
            request_id,
            reason,
            usage,
            prompt_bytes=live.prompt_bytes,
            completion_bytes=live.num_bytes,
            seconds=now - live.submitted,
            trace=live.trace,
        )

    def engine_ended(self) -> None:
        """The next engine counts from 0."""
        self._base, self._last = self.totals, EngineStats()


def added(one: EngineStats, other: EngineStats) -> EngineStats:
    """The totals of two engines in one."""
    return EngineStats(
        prompt_bytes_total=one.prompt_bytes_total + other.prompt_bytes_total,
        generation_bytes_total=one.generation_bytes_total + other.generation_bytes_total,
        chunks_total=tuple(a + b for a, b in zip_longest(one.chunks_total, other.chunks_total, fillvalue=0)),
        preemptions_total=one.preemptions_total + other.preemptions_total,
        overlapped_ticks_total=one.overlapped_ticks_total + other.overlapped_ticks_total,
        prefix_cache_queries_bytes_total=(
            one.prefix_cache_queries_bytes_total + other.prefix_cache_queries_bytes_total
        ),
        prefix_cache_hits_bytes_total=one.prefix_cache_hits_bytes_total + other.prefix_cache_hits_bytes_total,
    )
