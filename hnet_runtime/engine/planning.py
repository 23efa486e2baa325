"""What stages cost and routers say, measured while serving, and the best number of rows to wait for. Knows counts,
seconds and rates; no rows, no policies, no tensors and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]
"""[rows + 1] seconds by number of rows; 0 rows cost nothing."""

DECODER_SHARE = 0.5
"""Of what a routed stage's stacks cost together. A fire runs the decoders below it once more, for its rows alone."""


# ── what is measured ──────────────────────────────────────────────────────────────────────────


@dataclass
class _Bucket:
    rows: float
    seconds: float
    count: int = 1


class CostModel:
    """Seconds of one stage's run by its number of rows, from runs: one bucket for each number to 8, four an octave
    above. A bucket counts from its second run on, by the faster of the two (the first may compile, capture or fault
    pages in); then it follows with weight 1/8, and no single run moves it by more than that."""

    _WEIGHT = 1 / 8
    _ENOUGH = 8

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._count = 0

    @property
    def is_known(self) -> bool:
        return self._count >= self._ENOUGH and any(bucket.count > 1 for bucket in self._buckets.values())

    def observe(self, rows: int, seconds: float) -> None:
        self._count += 1
        index = rows if rows <= 8 else 8 + round(4 * math.log2(rows / 8))
        bucket = self._buckets.get(index)
        if bucket is None:
            self._buckets[index] = _Bucket(rows, seconds)
            return
        bucket.count += 1
        if bucket.count == 2:
            if seconds < bucket.seconds:
                bucket.rows, bucket.seconds = rows, seconds
            return
        bucket.rows += self._WEIGHT * (rows - bucket.rows)
        bucket.seconds += self._WEIGHT * (min(seconds, 2 * bucket.seconds) - bucket.seconds)

    def curve(self, most_rows: int) -> Curve:
        """[most_rows + 1], never falling: what was measured, pooled where it fell; lines between; and the mean slope
        on beyond it, but never more than in proportion to the rows. Where a single bucket is all, flat above it."""
        known = sorted((bucket for bucket in self._buckets.values() if bucket.count > 1), key=lambda each: each.rows)
        rows = np.array([bucket.rows for bucket in known])
        seconds = _pooled([bucket.seconds for bucket in known], [min(bucket.count, 16) for bucket in known])
        wanted = np.arange(most_rows + 1, dtype=np.float64)
        curve: Curve = np.interp(wanted, rows, seconds)
        slope = (seconds[-1] - seconds[0]) / (rows[-1] - rows[0]) if len(known) > 1 else 0.0
        above = wanted > rows[-1]
        curve[above] += min(slope, seconds[-1] / rows[-1]) * (wanted[above] - rows[-1])
        below = wanted < rows[0]
        if len(known) == 1:  # nothing says how much of it is reading weights: half, taken for now
            slope = seconds[0] / rows[0] / 2
        curve[below] = seconds[0] - min(slope, seconds[0] / rows[0]) * (rows[0] - wanted[below])
        curve[0] = 0.0
        return curve


def _pooled(values: Sequence[float], weights: Sequence[int]) -> Curve:
    """The nearest sequence that never falls: neighbours that do are pooled at their weighted mean."""
    pools: list[tuple[float, int, int]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        mean, total, members = value, weight, 1
        while pools and pools[-1][0] > mean:
            before, held, count = pools.pop()
            mean, total, members = (before * held + mean * total) / (held + total), held + total, members + count
        pools.append((mean, total, members))
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])


class BoundaryRate:
    """Share of a stage's positions that open a chunk, over about the last 4096 positions."""

    _MEMORY = 4096
    _ENOUGH = 64

    def __init__(self) -> None:
        self._positions, self._boundaries = 0.0, 0.0

    @property
    def is_known(self) -> bool:
        return self._positions >= self._ENOUGH

    @property
    def value(self) -> float:
        """0.01–1: a stage that never opens a chunk never fires, and a cycle would not end."""
        return max(self._boundaries / self._positions, 0.01)

    def saw(self, positions: int, boundaries: int) -> None:
        keep = max(1 - positions / self._MEMORY, 0.0)
        self._positions = keep * self._positions + positions
        self._boundaries = keep * self._boundaries + boundaries


# ── what is best ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Cycle:
    """From nobody waiting in a lane until `threshold` rows or more do, and it has fired: expected rows fired, seconds,
    and bytes of all rows on the way."""

    threshold: int
    fired: float
    seconds: float
    bytes: float

    @property
    def rate(self) -> float:
        return self.bytes / self.seconds


class Planner:
    """The best thresholds for given costs and boundary rates. Taken for independent: rows, and a row's positions.

    curves: of each stage's own stacks; outside: of what a tick takes beside them, which more and smaller ticks pay more
    often. A lane's step is one whole cycle of the lane below it; the lowest one's is a byte of every row that runs.
    parked: of each stage, what a step of rows due there takes where those that open a chunk wait, with what is outside
    it and the decoders of those that do not; reckoned from the curves where it is not known.
    """

    def __init__(
        self,
        curves: Sequence[Curve],
        rates: Sequence[float],
        outside: Curve | None = None,
        parked: Sequence[Curve] | None = None,
    ) -> None:
        self.most_rows = len(curves[0]) - 1
        self._curves, self._rates = list(curves), list(rates)
        self._outside = np.zeros(self.most_rows + 1) if outside is None else outside
        self._binomials = [_binomials(self.most_rows, rate) for rate in rates]
        self._parking = [
            (1 - DECODER_SHARE) * curve + DECODER_SHARE * _at_share(curve, 1 - rate)
            for curve, rate in zip(curves, rates, strict=False)
        ]
        self._parked = parked or [self._step_that_parks(stage) for stage in range(len(curves))]
        self._cycles: dict[tuple[int, int], Cycle] = {}
        self._gains: dict[int, float] = {}

    def gain(self, live: int) -> float:
        """Bytes a second with parking ÷ those of lock-step."""
        live = nearest_planned(live)
        gain = self._gains.get(live)
        if gain is None:
            gain = self._gains[live] = self.parked_rate(live) / self.through_rate(live)
        return gain

    def parked_rate(self, live: int) -> float:
        """Bytes a second with parking, every lane at its best threshold."""
        return self._cycle(len(self._rates), live).rate

    def threshold(self, stage: int, circulating: int) -> int:
        """Rows parked at `stage` at which it fires, 1 to `circulating`, where so many wait there or run below it."""
        planned = nearest_planned(circulating)
        return max(round(self._cycle(stage, planned).threshold * circulating / planned), 1)

    def through_rate(self, live: int) -> float:
        """Bytes a second of lock-step."""
        seconds, reached = float(self._curves[0][live] + self._outside[live]), 1.0
        for curve, rate in zip(self._curves[1:], self._rates, strict=True):
            reached *= rate
            seconds += float(_binomial(live, reached) @ curve[: live + 1])
        return live / seconds

    def parking_share(self, stage: int, rows: int) -> float:
        """What a run of a routed stage costs where rows with a boundary park ÷ where they go through: a step without
        their decoders."""
        rows = min(rows, self.most_rows)
        return float(self._parking[stage][rows] / self._curves[stage][rows])

    def differs(self, curves: Sequence[Curve], rates: Sequence[float], outside: Curve, live: int, by: float) -> bool:
        """Whether others are so far from these, in costs of up to `live` rows, that plans may change."""
        if len(curves[0]) != self.most_rows + 1:
            return True
        seen = slice(1, live + 1)
        if np.any(np.abs(outside[seen] - self._outside[seen]) > by * self._curves[0][seen]):
            return True
        return any(
            bool(np.any(np.abs(new[seen] - old[seen]) > by * old[seen]))
            for new, old in zip(curves, self._curves, strict=True)
        ) or any(abs(new - old) > by * old for new, old in zip(rates, self._rates, strict=True))

    def _step_that_parks(self, stage: int) -> Curve:
        """[rows + 1] seconds: the stage, and the decoders below it for those rows that finish their byte."""
        is_main = stage == len(self._rates)
        own = self._curves[stage] if is_main else self._parking[stage]
        finishing = 1.0 if is_main else 1 - self._rates[stage]
        decoders = sum(DECODER_SHARE * _at_share(curve, finishing) for curve in self._curves[:stage])
        return own + decoders + self._outside

    def _cycle(self, stage: int, rows: int) -> Cycle:
        if stage == 0:
            return Cycle(0, rows, float(self._parked[0][rows]), rows)
        cycle = self._cycles.get((stage, rows))
        if cycle is None:
            cycle = self._cycles[stage, rows] = self._best(stage, rows)
        return cycle

    def _best(self, stage: int, rows: int) -> Cycle:
        """Over all thresholds at once. The number that waits only grows, so how often each number is seen before the
        threshold does not depend on where the threshold lies."""
        binomials, fire = self._binomials[stage - 1], self._parked[stage]
        entered = np.zeros(rows + 1)  # expected; of those at and above the threshold, the probability to fire there
        entered[0] = 1.0
        seconds, produced, best_rate, best = 0.0, 0.0, 0.0, None
        for waiting in range(rows):
            running = rows - waiting
            step = self._step(stage - 1, running)
            moves = binomials[min(max(round(step.fired), 1), running)]
            visits = float(entered[waiting] / (1 - moves[0]))
            chances = entered[waiting + 1 :]  # a view
            chances += visits * moves[1 : running + 1]
            seconds += visits * step.seconds
            produced += visits * step.bytes
            spent = seconds + float(chances @ fire[waiting + 1 : rows + 1])
            if produced > best_rate * spent:
                best_rate, best = produced / spent, (waiting + 1, chances.copy(), spent, produced)
        assert best is not None
        threshold, chances, spent, produced = best
        return Cycle(threshold, float(chances @ np.arange(threshold, rows + 1)), spent, produced)

    def _step(self, stage: int, rows: int) -> Cycle:
        """A cycle of the lane below; of a number of rows that is not planned for, by the nearest one's rates."""
        planned = nearest_planned(rows)
        cycle, scale = self._cycle(stage, planned), rows / planned
        if scale == 1 or stage == 0:
            return cycle if scale == 1 else self._cycle(stage, rows)
        return Cycle(cycle.threshold, cycle.fired * scale, cycle.seconds, cycle.bytes * scale)


def nearest_planned(rows: int) -> int:
    """Plans are made for each number to 16, and eight an octave above."""
    spacing = 1 << max((rows - 1).bit_length() - 4, 0)
    return max((rows + spacing // 2) // spacing * spacing, 1)


def _at_share(curve: Curve, share: float) -> Curve:
    """The cost of that share of each number of rows."""
    rows = np.arange(len(curve), dtype=np.float64)
    return np.interp(share * rows, rows, curve)


def _binomials(most: int, rate: float) -> NDArray[np.float64]:
    """[most + 1, most + 1]: chance of k boundaries in n positions."""
    table = np.zeros((most + 1, most + 1))
    table[0, 0] = 1.0
    for n in range(1, most + 1):
        table[n, : n + 1] = (1 - rate) * table[n - 1, : n + 1]
        table[n, 1 : n + 1] += rate * table[n - 1, :n]
    return table


def _binomial(n: int, rate: float) -> NDArray[np.float64]:
    """[n + 1]: the last row of that table alone. rate: below 1, or every position opens a chunk."""
    if rate >= 1:
        return np.array([0.0] * n + [1.0])
    k = np.arange(1, n + 1)
    logarithms = np.cumsum(np.log((n + 1 - k) / k)) + k * math.log(rate / (1 - rate))
    return np.exp(n * math.log1p(-rate) + np.concatenate(([0.0], logarithms)))
