"""Records and counters of a level → its figures, and whether what the client saw and the server counted add up.

Knows records and scrapes; no sockets. What is due in the warm-up is left out of the figures of the client, and is part
of the comparison, since a server's counters know no warm-up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from loadtests.level import Level
from loadtests.memory import Memory
from loadtests.scenario import Objective
from loadtests.scrape import Scrape
from loadtests.stream import OUTCOMES, Record

SERVED = ("complete", "aborted")
KEEPS_UP = 0.9  # share of the requests offered that has to be served while they are offered
NEIGHBOURS = 10  # samples of memory whose median stands for one
LATE = 0.05  # seconds by which the client itself may be late, 0.99 quantile


@dataclass(frozen=True)
class Quantiles:
    """Of so many values; NaN where there is none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        found = sorted(values)
        if not found:
            return cls(0, *[math.nan] * 5)
        p50, p90, p99 = (quantile(found, share) for share in (0.5, 0.9, 0.99))
        return cls(len(found), sum(found) / len(found), p50, p90, p99, found[-1])


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least of the values that at least `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Check:
    """A count of the client's and the server's: `server` has to be within `least` and `most`."""

    name: str
    least: float
    most: float
    server: float

    @property
    def holds(self) -> bool:
        return self.least <= self.server <= self.most


@dataclass(frozen=True)
class Figures:
    """A level's. Rates are a second of the counted time; seconds of latency; attained: share of the requests offered.

    offered, served: requests that were due, and that came to their end, in the counted time. goodput: bytes of streams
    that came whole or were the client's to end; good: of those among them that kept the objective.
    """

    rate: float
    offered: float
    served: float
    throughput: float
    goodput: float
    good: float
    attained: float
    outcomes: dict[str, int]
    without_retry_after: int
    first_byte: Quantiles
    gap: Quantiles
    stream_rate: Quantiles
    lateness: Quantiles
    unsent: int
    checks: tuple[Check, ...]
    server: dict[str, float | None]
    memory: tuple[Memory, ...] = ()

    @property
    def growth(self) -> float | None:
        """Memory at the level's end ÷ that after its first quarter, the medians of ten samples; None if too few."""
        if len(self.memory) < 4 * NEIGHBOURS:
            return None
        first, last = len(self.memory) // 4, len(self.memory) - NEIGHBOURS
        before, after = (median(size for _, size in self.memory[at : at + NEIGHBOURS]) for at in (first, last))
        return after / before

    @property
    def keeps_up(self) -> bool:
        return self.served >= KEEPS_UP * self.offered

    @property
    def adds_up(self) -> bool:
        return all(check.holds for check in self.checks)

    @property
    def is_client_fit(self) -> bool:
        """Whether the client sent when it should have: else the figures are of the client."""
        return self.unsent == 0 and not self.lateness.p99 > LATE

    def to_json(self) -> dict[str, Any]:
        derived = {
            "growth": self.growth,
            "keeps_up": self.keeps_up,
            "adds_up": self.adds_up,
            "is_client_fit": self.is_client_fit,
        }
        checks = [{**asdict(check), "holds": check.holds} for check in self.checks]
        return {**asdict(self), **derived, "checks": checks}


def figures(level: Level, objective: Objective) -> Figures:
    began, ended = level.started + level.warm_up, level.started + level.seconds
    seconds = ended - began
    counted = [record for record in level.records if began <= record.due < ended]
    served = [record for record in level.records if record.outcome in SERVED]
    kept = [record for record in served if keeps(record, objective)]
    rejected = [record for record in level.records if record.outcome == "rejected"]
    sent = [record for record in counted if record.outcome != "unsent"]
    return Figures(
        rate=level.rate,
        offered=len(counted) / seconds,
        served=sum(began <= record.end < ended for record in served) / seconds,
        throughput=_bytes(level.records, began, ended) / seconds,
        goodput=_bytes(served, began, ended) / seconds,
        good=_bytes(kept, began, ended) / seconds,
        attained=sum(keeps(record, objective) for record in counted) / len(counted) if counted else math.nan,
        outcomes={outcome: sum(record.outcome == outcome for record in level.records) for outcome in OUTCOMES},
        without_retry_after=sum(record.retry_after is None for record in rejected),
        first_byte=Quantiles.of(record.first_byte for record in counted if record.first_byte is not None),
        gap=Quantiles.of(gap for record in counted for gap in record.gaps),
        stream_rate=Quantiles.of(record.rate for record in counted if record.rate is not None),
        lateness=Quantiles.of(record.sent - record.due for record in sent),
        unsent=len(counted) - len(sent),
        checks=compare(level.records, level.counted) if level.counted else (),
        server=_server(level.counted) if level.counted else {},
        memory=level.memory,
    )


def keeps(record: Record, objective: Objective) -> bool:
    """Whether one stream was what the objective promises: served, begun in time and never silent for too long."""
    if record.outcome not in SERVED or record.first_byte is None:
        return False
    return record.first_byte <= objective.first_byte and max(record.gaps, default=0.0) <= objective.gap


def _bytes(records: Iterable[Record], began: float, ended: float) -> int:
    """That arrived in the time."""
    found = 0
    for record in records:
        before = 0
        for when, so_far in record.arrivals:
            if began <= when < ended:
                found += so_far - before
            before = so_far
    return found


def compare(records: Sequence[Record], counted: Scrape) -> tuple[Check, ...]:
    """A stream that its client ended may have been over for the server, so there a count has a range."""
    number = Counter(record.outcome for record in records)
    accepted = sum(record.status == 200 for record in records)
    unknown = sum(record.outcome in ("unfinished", "failed") and record.status == 0 for record in records)
    finished = {reason: counted.total("request_finished_total", reason=reason) for reason in ("stop", "length")}
    complete = [record for record in records if record.outcome == "complete"]
    told = sum(record.completion_tokens or 0 for record in complete)
    cut = sum(record.num_bytes for record in records if record.outcome != "complete")
    is_all = number["complete"] == accepted and not unknown
    read = sum(record.prompt_tokens or 0 for record in complete)
    loose = number["aborted"] + number["unfinished"] + number["broken"]
    return (
        Check("requests accepted", accepted, accepted + unknown, counted.total("request_finished_total")),
        Check("requests that came to their end", len(complete), len(complete) + loose, sum(finished.values())),
        Check("requests turned away", number["rejected"], number["rejected"], _rejections(counted)),
        Check("requests failed", 0, number["failed"], counted.total("request_finished_total", reason="error")),
        Check(
            "bytes generated", told + cut, told if is_all else math.inf, counted.total("request_generation_bytes_sum")
        ),
        Check("bytes of prompts", read, read if is_all else math.inf, counted.total("request_prompt_bytes_sum")),
    )


def _rejections(counted: Scrape) -> float:
    return counted.total("admission_rejections_total")


def _server(counted: Scrape) -> dict[str, float | None]:
    """What only the server knows of the level, warm-up included; seconds are means."""
    generated, chunks = counted.total("generation_bytes_total"), _outermost_chunks(counted)
    asked, hit = (counted.total(f"prefix_cache_{what}_bytes_total") for what in ("queries", "hits"))
    read = counted.total("prompt_bytes_total")
    return {
        "first byte (mean s)": counted.mean("time_to_first_byte_seconds"),
        "in the queue (mean s)": counted.mean("request_queue_time_seconds"),
        "reading the prompt (mean s)": counted.mean("request_prefill_time_seconds"),
        "between two bytes (mean s)": counted.mean("inter_byte_latency_seconds"),
        "bytes of a chunk": (generated + read) / chunks if chunks else None,
        "share of prompts' bytes from the prefix cache": hit / asked if asked else None,
        "preemptions": counted.total("num_preemptions_total"),
    }


def _outermost_chunks(counted: Scrape) -> float:
    return counted.total("chunks_total", stage="1")


def knee(levels: Sequence[Figures]) -> Figures | None:
    """The highest level up to which every level kept up with what was offered; None where the first did not."""
    found = None
    for level in levels:
        if not level.keeps_up:
            break
        found = level
    return found


def meets(level: Figures, objective: Objective) -> bool:
    return level.attained >= objective.share
