"""When parked rows run: lock-step, aligned or adaptive. Knows counts, seconds and rates; no rows, no requests, no
tensors and no clock.

A row that opens a chunk parks, due at stage 1; while it waits the others run on. Firing a lane runs its stage once for
every row parked there. Reading the weights of a stage is most of what a run of few rows costs, so that one fire of many
rows is cheaper than many of one; the price is the wait. Policies decide once a tick, and never change what a row gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from hnet_runtime.engine.planning import BoundaryRate, CostModel, Planner

PolicyName = Literal["lockstep", "aligned", "adaptive"]


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

    def goes_through(self, situation: Situation) -> bool:
        """Whether `choose` is going to say Through of a situation in which nobody waits. To ask changes nothing, and
        no is always an answer: a tick in which the policy has more to do than to answer is not foreseen."""

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        """One run of a stage's own stacks with that many rows: of every stage that a Through reached, of stage 0 in a
        Step, of the fired stage in a Fire (whose decoders below it are not told)."""

    def observe_outside(self, rows: int, seconds: float) -> None:
        """What a tick that decoded so many rows, and did nothing else, took beside all stages."""

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


class _Bounded(ABC):
    """What holds for every policy: the limits, and that a lone row, or one without lanes, goes through at once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def choose(self, situation: Situation) -> Decision:
        waiting = [lane for lane in situation.lanes if lane.waiting]
        if not situation.lanes or situation.live == 1:
            return _at_once(situation)
        overdue = self._overdue(waiting) if waiting else None
        return self._decide(situation) if overdue is None else Fire(overdue.stage)

    def goes_through(self, situation: Situation) -> bool:
        return not situation.lanes or situation.live == 1 or self._foresees_through(situation.live)

    @abstractmethod
    def _decide(self, situation: Situation) -> Decision:
        """Of several live rows, none of them overdue."""

    @abstractmethod
    def _foresees_through(self, live: int) -> bool:
        """Of several live rows, none of them waiting."""

    def _overdue(self, lanes: Sequence[Lane]) -> Lane | None:
        # One lane fires a tick: each must be early enough for the others to go first.
        ticks, seconds = self._limits.max_wait_ticks, self._limits.max_wait_seconds
        over = [lane for lane in lanes if lane.oldest_ticks > ticks - len(lanes) or lane.oldest_seconds >= seconds]
        return max(over, key=lambda lane: max(lane.oldest_ticks / ticks, lane.oldest_seconds / seconds), default=None)


class _Unmeasured(_Bounded):
    """Of what was measured, nothing matters."""

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        pass

    def observe_outside(self, rows: int, seconds: float) -> None:
        pass

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        pass


class Lockstep(_Unmeasured):
    """Every row goes through. What waits (a row that was parked under another policy, and resumed) catches up first."""

    def _decide(self, situation: Situation) -> Decision:
        return _at_once(situation)

    def _foresees_through(self, live: int) -> bool:
        return True


class Aligned(_Unmeasured):
    """Fires the fullest lane when nobody can run, or when `share` of the live rows wait in it."""

    def __init__(self, limits: Limits, share: float = 0.75) -> None:
        super().__init__(limits)
        self._share = share

    def _decide(self, situation: Situation) -> Decision:
        fullest = max(situation.lanes, key=lambda lane: lane.waiting)
        if situation.runnable and fullest.waiting < self._share * situation.live:
            return Step()
        return Fire(fullest.stage) if fullest.waiting else Through()

    def _foresees_through(self, live: int) -> bool:
        return False  # who opens a chunk parks


class Adaptive(_Bounded):
    """Fires a lane at the number of waiting rows that gives the most bytes a second by the costs and rates measured
    while serving, and goes through where parking would gain less than a few percent, or too little is known.

    Now and then it runs a few ticks another way, so that none is judged by costs of long ago: going through where it
    parks, parking where it goes through, and of parking also the way that fires nobody before all wait, so that costs
    of many rows are known.
    """

    _GAIN = 1.08  # parking must promise: what is foreseen is a few percent off
    _REFRESH = 32  # ticks between looks at what was measured; after each one that changes nothing, twice as many
    _LAST_REFRESH = 128
    _MOVED = 0.1  # a change by so much makes new plans
    _PROBE = 8  # ticks the other way,
    # soon where rows go through, since nothing is known of parking yet, and later where they park, since they went
    # through at first; then after twice as many ticks each time, up to so many.
    _FIRST_PROBE: ClassVar[dict[bool, int]] = {False: 64, True: 1024}
    _LAST_PROBE = 8192

    def __init__(self, num_stages: int, limits: Limits) -> None:
        super().__init__(limits)
        self._costs = [CostModel() for _ in range(num_stages)]
        self._rates = [BoundaryRate() for _ in range(num_stages - 1)]
        self._planner: Planner | None = None
        self._tick, self._probe, self._probes = 0, 0, 0
        self._refresh_interval = self._next_refresh = self._REFRESH
        self._interval = self._next_probe = self._FIRST_PROBE[False]
        self._planned_parking = False  # what the plan said last
        self._parks = False  # in the tick chosen last
        self._outside = CostModel()

    def choose(self, situation: Situation) -> Decision:
        decision = super().choose(situation)
        self._parks = isinstance(decision, Step) or (isinstance(decision, Fire) and not decision.through)
        return decision

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        if self._parks and self._planner is not None and stage < len(self._rates):
            seconds /= self._planner.parking_share(stage, rows)  # costs are kept of whole runs, of either way
        self._costs[stage].observe(rows, seconds)

    def observe_outside(self, rows: int, seconds: float) -> None:
        self._outside.observe(rows, seconds)

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        self._rates[stage].saw(positions, boundaries)

    def _decide(self, situation: Situation) -> Decision:
        self._tick += 1
        live = situation.live
        if self._is_to_refresh(self._tick, live):
            changed = self._refresh(live)
            self._refresh_interval = self._REFRESH if changed else min(2 * self._refresh_interval, self._LAST_REFRESH)
            self._next_refresh = self._tick + self._refresh_interval
        planner = self._planner
        if planner is None:
            return _at_once(situation)
        parks = planner.gain(live) >= self._GAIN
        if parks and not self._planned_parking:
            self._interval = max(self._interval, self._FIRST_PROBE[True])
            self._next_probe = self._tick + self._interval
        self._planned_parking = parks
        waits_for_all = False
        if self._probe:
            self._probe -= 1
            waits_for_all = parks and self._probes % 2 == 1
            parks = not parks or waits_for_all
        elif self._tick >= self._next_probe:
            self._probe, self._probes = self._PROBE, self._probes + 1
            self._interval = min(2 * self._interval, self._LAST_PROBE)
            self._next_probe = self._tick + self._interval
        if not parks:
            return _at_once(situation)
        # The deepest lane first: who circulates below it is who does not wait in it.
        circulating = live
        for lane in reversed(situation.lanes):
            threshold = circulating if waits_for_all else self._threshold(planner, lane.stage, circulating, situation)
            if lane.waiting and lane.waiting >= threshold:
                return Fire(lane.stage)
            circulating -= lane.waiting
        return Step()

    def _foresees_through(self, live: int) -> bool:
        tick = self._tick + 1
        if self._is_to_refresh(tick, live):
            return False
        if self._planner is None:
            return True
        return not self._probe and tick < self._next_probe and self._planner.gain(live) < self._GAIN

    def _is_to_refresh(self, tick: int, live: int) -> bool:
        return tick >= self._next_refresh or (self._planner is not None and live > self._planner.most_rows)

    def _threshold(self, planner: Planner, stage: int, circulating: int, situation: Situation) -> int:
        """Waiting rows at which to fire; a few more while rows are about to join. At most all who circulate."""
        threshold = planner.threshold(stage, circulating)
        if situation.prefilling:
            joined = planner.threshold(stage, min(circulating + situation.prefilling, planner.most_rows))
            threshold = max(threshold, min(joined, threshold + -(-threshold // 4)))
        return min(threshold, circulating)

    def _refresh(self, live: int) -> bool:
        """Looks at what was measured; whether there are new plans, or not enough for any yet."""
        if not all(cost.is_known for cost in self._costs) or not all(rate.is_known for rate in self._rates):
            return True
        most_rows = 1 << max(live - 1, 15).bit_length()
        if self._planner is not None:
            most_rows = max(most_rows, self._planner.most_rows)
        curves = [cost.curve(most_rows) for cost in self._costs]
        rates = [rate.value for rate in self._rates]
        outside = self._outside.curve(most_rows) if self._outside.is_known else np.zeros(most_rows + 1)
        if self._planner is not None and not self._planner.differs(curves, rates, outside, live, self._MOVED):
            return False
        self._planner = Planner(curves, rates, outside)
        return True


def _at_once(situation: Situation) -> Decision:
    """Nobody is left waiting: lanes first, the lowest first so that what it parks joins the next one."""
    waiting = [lane.stage for lane in situation.lanes if lane.waiting]
    if not waiting:
        return Through()
    return Fire(waiting[0], through=len(waiting) == 1)
