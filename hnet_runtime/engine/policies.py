"""When parked rows run: lock-step, aligned or adaptive. Knows counts, seconds and rates; no rows, no requests, no
tensors and no clock.

A row that opens a chunk parks, due at stage 1; while it waits the others run on. Firing a lane runs its stage once for
every row parked there. Reading the weights of a stage is most of what a run of few rows costs, so that one fire of many
rows is cheaper than many of one; the price is the wait. Policies decide once a tick, and never change what a row gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

PolicyName = Literal["lockstep", "aligned", "adaptive"]
Curve = NDArray[np.float64]
"""[rows + 1] seconds by number of rows; 0 rows cost nothing."""

DECODER_SHARE = 0.5
"""Of what a routed stage's stacks cost together. A fire runs the decoders below it once more, for its rows alone."""


@dataclass(frozen=True)
class Lane:
    """Rows parked at a stage. Ages are the oldest one's since it parked in this lane: ticks that have run meanwhile
    (0 in the tick after the one it parked in) and seconds; 0 where nobody waits."""

    stage: int
    waiting: int
    oldest_ticks: int
    oldest_seconds: float


@dataclass(frozen=True)
class Situation:
    """What a policy sees of a tick. lanes: one a stage ≥ 1, in order, also empty ones; prefilling: rows whose prompt is
    being read and who join soon."""

    runnable: int
    lanes: tuple[Lane, ...]
    prefilling: int = 0

    @property
    def live(self) -> int:
        """Rows that decode, parked or not."""
        return self.runnable + sum(lane.waiting for lane in self.lanes)


@dataclass(frozen=True)
class Through:
    """One byte of every runnable row through every stage that is due for it: nobody parks."""


@dataclass(frozen=True)
class Step:
    """One byte of every runnable row; rows that open a chunk park."""


@dataclass(frozen=True)
class Fire:
    """Runs `stage` for all rows parked there. Rows that open a chunk in it go on at once where `through`, else park."""

    stage: int
    through: bool = False


Decision = Through | Step | Fire


@dataclass(frozen=True)
class Limits:
    """How long a row may wait in one lane, whatever the policy: so many ticks, and so many seconds to within the ticks
    that are under way when they are over. Raises ValueError unless both are positive."""

    max_wait_ticks: int = 64
    max_wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.max_wait_ticks < 1 or not self.max_wait_seconds > 0:
            raise ValueError(f"a wait of {self.max_wait_ticks} ticks, {self.max_wait_seconds} s allows none")


class Policy(Protocol):
    """Chooses what a tick runs, and is told what it cost and what routers said. Not for several threads."""

    def choose(self, situation: Situation) -> Decision:
        """Never a Step or Through of nobody, never the Fire of an empty lane. Somebody is live."""

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        """One run of a stage's own stacks with that many rows: of every stage that a Through reached, of stage 0 in a
        Step, of the fired stage in a Fire (whose decoders below it are not told)."""

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        """What the router of a stage below the main network said."""


def make_policy(name: PolicyName, num_stages: int, limits: Limits | None = None) -> Policy:
    """Raises ValueError for a name that is none, and limits that several lanes could not keep."""
    limits = limits or Limits()
    if limits.max_wait_ticks < num_stages - 1:
        raise ValueError(f"max_wait_ticks must be at least {num_stages - 1}: one lane fires a tick")
    match name:
        case "lockstep":
            return Lockstep(limits)
        case "aligned":
            return Aligned(limits)
        case "adaptive":
            return Adaptive(num_stages, limits)
    raise ValueError(f"the policy must be lockstep, aligned or adaptive, not {name!r}")


class _Bounded:
    """What holds for every policy: the limits, and that a lone row, or one without lanes, goes through at once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def choose(self, situation: Situation) -> Decision:
        if situation.live == 1 or not situation.lanes:
            return _at_once(situation)
        overdue = self._overdue([lane for lane in situation.lanes if lane.waiting])
        return self._decide(situation) if overdue is None else Fire(overdue.stage)

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        """Costs do not matter here."""

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        """Rates do not matter here."""

    def _decide(self, situation: Situation) -> Decision:
        raise NotImplementedError

    def _overdue(self, lanes: Sequence[Lane]) -> Lane | None:
        # One lane fires a tick: each must be early enough for the others to go first.
        ticks, seconds = self._limits.max_wait_ticks, self._limits.max_wait_seconds
        over = [lane for lane in lanes if lane.oldest_ticks > ticks - len(lanes) or lane.oldest_seconds >= seconds]
        return max(over, key=lambda lane: max(lane.oldest_ticks / ticks, lane.oldest_seconds / seconds), default=None)


class Lockstep(_Bounded):
    """Every row goes through. What waits (a row that was parked under another policy, and resumed) catches up first."""

    def _decide(self, situation: Situation) -> Decision:
        return _at_once(situation)


class Aligned(_Bounded):
    """Fires the fullest lane when nobody can run, or when `share` of the live rows wait in it."""

    def __init__(self, limits: Limits, share: float = 0.75) -> None:
        super().__init__(limits)
        self._share = share

    def _decide(self, situation: Situation) -> Decision:
        fullest = max(situation.lanes, key=lambda lane: lane.waiting)
        if situation.runnable and fullest.waiting < self._share * situation.live:
            return Step()
        return Fire(fullest.stage) if fullest.waiting else Through()


class Adaptive(_Bounded):
    """Fires a lane at the number of waiting rows that gives the most bytes a second by the costs and rates measured
    while serving, and goes through where parking would gain less than a few percent, or too little is known.

    Now and then it runs a few ticks the other way, so that neither way is judged by costs of long ago.
    """

    _GAIN = 1.03  # parking must promise
    _REFRESH = 32  # ticks between looks at what was measured
    _MOVED = 0.05  # a change by so much makes new plans
    _PROBE = 8  # ticks the other way,
    _PROBE_FIRST = 64  # soon at first, since little is known of the other way, then after twice as many each time
    _PROBE_PARKING, _PROBE_THROUGH = 512, 4096  # up to these; parking in vain lengthens gaps, going through does not

    def __init__(self, num_stages: int, limits: Limits) -> None:
        super().__init__(limits)
        self._costs = [CostModel() for _ in range(num_stages)]
        self._rates = [BoundaryRate() for _ in range(num_stages - 1)]
        self._planner: Planner | None = None
        self._tick, self._probe = 0, 0
        self._interval = self._next_probe = self._PROBE_FIRST
        self._parks = False  # in the tick chosen last

    def choose(self, situation: Situation) -> Decision:
        decision = super().choose(situation)
        self._parks = isinstance(decision, Step) or (isinstance(decision, Fire) and not decision.through)
        return decision

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        if self._parks and self._planner is not None and stage < len(self._rates):
            seconds /= self._planner.parking_share(stage, rows)  # costs are kept of whole runs, of either way
        self._costs[stage].observe(rows, seconds)

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        self._rates[stage].saw(positions, boundaries)

    def _decide(self, situation: Situation) -> Decision:
        self._tick += 1
        live = situation.live
        if self._tick % self._REFRESH == 0 or (self._planner is not None and live > self._planner.most_rows):
            self._refresh(live)
        planner = self._planner
        if planner is None:
            return _at_once(situation)
        parks = planner.gain(live) >= self._GAIN
        if self._probe:
            self._probe -= 1
            parks = not parks
        elif self._tick >= self._next_probe:
            self._probe = self._PROBE
            self._interval = min(2 * self._interval, self._PROBE_PARKING if parks else self._PROBE_THROUGH)
            self._next_probe = self._tick + self._interval
        if not parks:
            return _at_once(situation)
        # The deepest lane first: who circulates below it is who does not wait in it.
        circulating = live
        for lane in reversed(situation.lanes):
            if lane.waiting and lane.waiting >= self._threshold(planner, lane.stage, circulating, situation):
                return Fire(lane.stage)
            circulating -= lane.waiting
        return Step()

    def _threshold(self, planner: Planner, stage: int, circulating: int, situation: Situation) -> int:
        """Waiting rows at which to fire; a few more while rows are about to join. At most all who circulate."""
        threshold = planner.threshold(stage, circulating)
        if situation.prefilling:
            joined = planner.threshold(stage, min(circulating + situation.prefilling, planner.most_rows))
            threshold = max(threshold, min(joined, threshold + -(-threshold // 4)))
        return min(threshold, circulating)

    def _refresh(self, live: int) -> None:
        if not all(cost.is_known for cost in self._costs) or not all(rate.is_known for rate in self._rates):
            return
        most_rows = 1 << max(live - 1, 15).bit_length()
        if self._planner is not None:
            most_rows = max(most_rows, self._planner.most_rows)
        curves = [cost.curve(most_rows) for cost in self._costs]
        rates = [rate.value for rate in self._rates]
        if self._planner is None or self._planner.differs(curves, rates, live, self._MOVED):
            self._planner = Planner(curves, rates)


def _at_once(situation: Situation) -> Decision:
    """Nobody is left waiting: lanes first, the lowest first so that what it parks joins the next one."""
    waiting = [lane.stage for lane in situation.lanes if lane.waiting]
    if not waiting:
        return Through()
    return Fire(waiting[0], through=len(waiting) == 1)


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

    A lane's step is one whole cycle of the lane below it; the lowest one's is a byte of every row that runs.
    """

    def __init__(self, curves: Sequence[Curve], rates: Sequence[float]) -> None:
        self.most_rows = len(curves[0]) - 1
        self._curves, self._rates = list(curves), list(rates)
        self._binomials = [_binomials(self.most_rows, rate) for rate in rates]
        self._parking = [
            (1 - DECODER_SHARE) * curve + DECODER_SHARE * _at_share(curve, 1 - rate)
            for curve, rate in zip(curves, rates, strict=False)
        ]
        self._fires = [self._fire(stage) for stage in range(1, len(curves))]
        self._cycles: dict[tuple[int, int], Cycle] = {}
        self._gains: dict[int, float] = {}

    def gain(self, live: int) -> float:
        """Bytes a second with parking ÷ those of lock-step."""
        live = nearest_planned(live)
        gain = self._gains.get(live)
        if gain is None:
            gain = self._gains[live] = self._cycle(len(self._rates), live).rate / self.through_rate(live)
        return gain

    def threshold(self, stage: int, circulating: int) -> int:
        """Rows parked at `stage` at which it fires, 1 to `circulating`, where so many wait there or run below it."""
        planned = nearest_planned(circulating)
        return max(round(self._cycle(stage, planned).threshold * circulating / planned), 1)

    def through_rate(self, live: int) -> float:
        """Bytes a second of lock-step."""
        seconds, reached = float(self._curves[0][live]), 1.0
        for curve, rate in zip(self._curves[1:], self._rates, strict=True):
            reached *= rate
            seconds += float(_binomial(live, reached) @ curve[: live + 1])
        return live / seconds

    def parking_share(self, stage: int, rows: int) -> float:
        """What a run of a routed stage costs where rows with a boundary park ÷ where they go through: a step without
        their decoders."""
        rows = min(rows, self.most_rows)
        return float(self._parking[stage][rows] / self._curves[stage][rows])

    def differs(self, curves: Sequence[Curve], rates: Sequence[float], live: int, by: float) -> bool:
        """Whether others are so far from these, in costs of up to `live` rows, that plans may change."""
        if len(curves[0]) != self.most_rows + 1:
            return True
        seen = slice(1, live + 1)
        return any(
            bool(np.any(np.abs(new[seen] - old[seen]) > by * old[seen]))
            for new, old in zip(curves, self._curves, strict=True)
        ) or any(abs(new - old) > by * old for new, old in zip(rates, self._rates, strict=True))

    def _fire(self, stage: int) -> Curve:
        """[rows + 1] seconds of a fire: the stage, and the decoders below it for those rows that finish their byte."""
        is_main = stage == len(self._rates)
        own = self._curves[stage] if is_main else self._parking[stage]
        finishing = 1.0 if is_main else 1 - self._rates[stage]
        return own + sum(DECODER_SHARE * _at_share(curve, finishing) for curve in self._curves[:stage])

    def _cycle(self, stage: int, rows: int) -> Cycle:
        if stage == 0:
            seconds = self._parking[0] if self._parking else self._curves[0]
            return Cycle(0, rows, float(seconds[rows]), rows)
        cycle = self._cycles.get((stage, rows))
        if cycle is None:
            cycle = self._cycles[stage, rows] = self._best(stage, rows)
        return cycle

    def _best(self, stage: int, rows: int) -> Cycle:
        """Over all thresholds at once. The number that waits only grows, so how often each number is seen before the
        threshold does not depend on where the threshold lies."""
        binomials, fire = self._binomials[stage - 1], self._fires[stage - 1]
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
