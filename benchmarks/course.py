"""One run of rows as their clients see it: when each byte came, and which bytes reached the main network.

Knows an engine's messages and the seconds its ticks took; no engine, no model and no clock of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hnet_runtime.engine.messages import Tick

WARM_UP = 10  # of the bytes, the first one in so many is not counted


class TooShort(ValueError):
    """A run of so few bytes that there is nothing to count."""


@dataclass(frozen=True)
class Counted:
    """What of a run counts: bytes, the ticks and seconds they took, seconds of those that no stage took, and seconds
    between the ends of a row's successive bytes that reached the main network."""

    num_bytes: int
    ticks: int
    seconds: float
    outside: float
    gaps: tuple[float, ...]

    @property
    def rate(self) -> float:
        return self.num_bytes / self.seconds


@dataclass
class _Row:
    prompt: int  # bytes
    arrivals: list[float] = field(default_factory=list)  # of each byte of the completion
    starts: dict[int, list[int]] = field(default_factory=dict)  # of each stage's chunks
    is_over: bool = False

    def ends(self, stage: int) -> list[float]:
        """When the bytes that opened a chunk of `stage` came to their end, which is when the next byte comes: those at
        the prompt's end or behind it."""
        following = (start + 1 - self.prompt for start in self.starts.get(stage, ()))
        return [self.arrivals[index] for index in following if 0 <= index < len(self.arrivals)]


@dataclass(frozen=True)
class _Tick:
    until: float  # on the course's clock
    gained: int
    seconds: float
    staged: float  # of them, in stages


class Course:
    """A run of rows that begin together, on a clock that goes while the engine ticks and at no other time.

    prompts: bytes of each request's prompt by its id; stages: of the model. What counts are the bytes from the tick
    after which every row has begun its completion to the one in which the first row ends, without the first tenth.
    """

    def __init__(self, prompts: Mapping[str, int], stages: int) -> None:
        self._rows = {request_id: _Row(length) for request_id, length in prompts.items()}
        self._main = stages - 1
        self._clock = 0.0
        self._ticks: list[_Tick] = []
        self._first: int | None = None  # tick after which all have begun

    @property
    def is_over(self) -> bool:
        """Whether a row has ended."""
        return any(row.is_over for row in self._rows.values())

    @property
    def gained(self) -> int:
        """Bytes of all completions so far."""
        return sum(len(row.arrivals) for row in self._rows.values())

    def take(self, tick: Tick, seconds: float) -> None:
        """What a tick gave and how long it took; raises RuntimeError for a row that failed."""
        self._clock += seconds
        gained = 0
        for output in tick.outputs:
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id}: {output.error}")
            row = self._rows[output.request_id]
            gained += len(output.data)
            row.arrivals += [self._clock] * len(output.data)
            for chunk in output.chunks:
                row.starts.setdefault(chunk.stage, []).append(chunk.start)
            row.is_over |= output.finish_reason is not None
        self._ticks.append(_Tick(self._clock, gained, seconds, sum(step.seconds for step in tick.stats.steps)))
        if self._first is None and all(row.arrivals for row in self._rows.values()):
            self._first = len(self._ticks)

    def counted(self) -> Counted:
        """Raises TooShort where nothing is left to count."""
        first = len(self._ticks) if self._first is None else self._first
        ticks = self._ticks[first:]
        total, skipped = sum(each.gained for each in ticks), 0
        warm = 0
        while warm < len(ticks) and skipped * WARM_UP < total:
            skipped += ticks[warm].gained
            warm += 1
        if skipped == total:
            raise TooShort("a row ended before anything could be counted: it takes more bytes a row")
        began, counted = ticks[warm - 1].until, ticks[warm:]
        seconds = sum(each.seconds for each in counted)
        return Counted(
            num_bytes=total - skipped,
            ticks=len(counted),
            seconds=seconds,
            outside=seconds - sum(each.staged for each in counted),
            gaps=self._gaps(self._ticks[first - 1].until, began, counted[-1].until),
        )

    def _gaps(self, decoding: float, began: float, until: float) -> tuple[float, ...]:
        """Those that end after `began` and no later than `until`, of bytes that ended since all rows were decoding."""
        return tuple(
            end - before
            for row in self._rows.values()
            for before, end in pairwise(row.ends(self._main))
            if before >= decoding and began < end <= until
        )

    def chunk_lengths(self) -> list[list[int]]:
        """For each routed stage, its positions in each whole chunk that the completions opened, row after row."""
        lengths: list[list[int]] = []
        for stage in range(self._main):
            found: list[int] = []
            for row in self._rows.values():
                starts = [start for start in row.starts.get(stage + 1, ()) if start >= row.prompt]
                inner: Sequence[int] = row.starts.get(stage, ())
                places = starts if stage == 0 else [bisect_left(inner, start) for start in starts]
                found += [following - place for place, following in pairwise(places)]
            lengths.append(found)
        return lengths
