"""Batching policies on virtual time: bytes a second and chunk gaps by what runs cost and how long chunks are.

    python -m benchmarks.policy_sim [--costs FILE] [--rows 1,4,8,16,32,64] [--bytes-per-chunk 4.8 | --lengths FILE]
                                    [--stages 2] [--total-bytes 40000] [--seed 1] [--plot FILE.png] [--json FILE]

No model: each tick runs the policy's decision on rows whose chunk lengths are drawn (geometric, or measured ones in
their order), takes as long as the cost table says, and tells the policy what an engine would. FILE of --costs is
{stage: {rows: seconds}}, of --lengths a list of measured chunk lengths for each routed stage. Without --costs two
tables are run, of an L model on a CPU where the main network is bound by arithmetic or by reading its weights.

The ceiling is the best policy of one fixed threshold a lane, found by search, which knows nothing but counts; lock-step
is among its candidates. A chunk gap is the time between the ends of a row's successive bytes that reach the main
network. Rows never end and none join; the first tenth of the bytes is not counted, as the policy learns in it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean

from hnet_runtime.engine.planning import DECODER_SHARE
from hnet_runtime.engine.policies import (
    Aligned,
    Decision,
    Fire,
    Lane,
    Limits,
    Policy,
    Situation,
    Step,
    Through,
    make_policy,
)

Costs = Mapping[int, Mapping[int, float]]
"""Seconds of each stage's own stacks by rows: {stage: {rows: seconds}}, lines between, the last slope on beyond."""
Lengths = float | Sequence[int]
"""Positions of a stage in a chunk of the next: the mean of geometric ones, or measured ones in their order."""

_ROUTED = {1: 5.0e-3, 64: 23.9e-3}  # 4.7 ms and 0.3 ms a row
DEFAULT_MAIN: dict[str, dict[int, float]] = {
    "compute-bound": {1: 58e-3, 4: 1.03 * 58e-3, 8: 1.6 * 58e-3, 16: 2.9 * 58e-3},
    "bandwidth-bound": {1: 58e-3, 4: 1.01 * 58e-3, 8: 1.04 * 58e-3, 16: 1.09 * 58e-3},
}
SHARES = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Simulated:
    """What a policy gave. Gaps in seconds; fires: runs of the main network, alone or in a step that went through.

    longest_wait_ticks, longest_wait_seconds: of any row in a lane; longest_tick: seconds."""

    bytes_per_second: float
    p50_gap: float
    p99_gap: float
    fires: int
    mean_rows_per_fire: float
    longest_wait_ticks: int
    longest_wait_seconds: float
    longest_tick: float


@dataclass(frozen=True)
class Ceiling:
    """The best fixed thresholds, one a lane, or None where that is lock-step; and what they gave."""

    thresholds: tuple[int, ...] | None
    simulated: Simulated


class Fixed:
    """Fires a lane at a fixed number of waiting rows, or when everyone who could come to it waits."""

    def __init__(self, thresholds: Sequence[int]) -> None:
        self._thresholds = tuple(thresholds)

    def choose(self, situation: Situation) -> Decision:
        circulating = situation.live
        for lane, threshold in zip(reversed(situation.lanes), reversed(self._thresholds), strict=True):
            if lane.waiting and lane.waiting >= min(threshold, circulating):
                return Fire(lane.stage)
            circulating -= lane.waiting
        return Step()

    def goes_through(self, situation: Situation) -> bool:
        return False

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        """Fixed means fixed."""

    def observe_outside(self, rows: int, seconds: float) -> None:
        """Fixed means fixed."""

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        """Fixed means fixed."""


def simulate(
    policy: Policy,
    costs: Costs,
    chunk_lengths: Sequence[Lengths],
    rows: int,
    total_bytes: int,
    seed: int,
    overhead: Mapping[int, float] | None = None,
) -> Simulated:
    """`rows` rows until they have `total_bytes` bytes together. chunk_lengths: one for each stage below the main
    network. overhead: {rows: seconds} of a tick beside all stages. A row's chunks depend on `seed` and the row alone:
    every policy meets the same. Raises ValueError for a decision that runs nobody, and where
    costs and lengths speak of different stages."""
    if sorted(costs) != list(range(len(chunk_lengths) + 1)):
        raise ValueError(f"costs of stages {sorted(costs)}, chunk lengths of {len(chunk_lengths)} routed stages")
    world = _World(policy, costs, chunk_lengths, rows, seed, overhead or {1: 0.0})
    while world.finished < total_bytes // 10:
        world.tick()
    started, skipped = world.now, world.finished
    for measured in (world.gaps, world.fired):
        measured.clear()
    while world.finished < total_bytes:
        world.tick()
    gaps = sorted(world.gaps)
    return Simulated(
        bytes_per_second=(world.finished - skipped) / (world.now - started),
        p50_gap=quantile(gaps, 0.5),
        p99_gap=quantile(gaps, 0.99),
        fires=len(world.fired),
        mean_rows_per_fire=fmean(world.fired) if world.fired else math.nan,
        longest_wait_ticks=world.longest_wait_ticks,
        longest_wait_seconds=world.longest_wait_seconds,
        longest_tick=world.longest_tick,
    )


def ceiling(
    costs: Costs,
    chunk_lengths: Sequence[Lengths],
    rows: int,
    total_bytes: int,
    seed: int,
    gap_limit: float | None = None,
    overhead: Mapping[int, float] | None = None,
) -> Ceiling:
    """The most bytes a second by fixed thresholds, with p99 chunk gaps of at most `gap_limit` seconds where one is
    given (lock-step stands whatever its gaps). One lane after the other is searched, twice where there are several."""

    def run(policy: Policy) -> Simulated:
        return simulate(policy, costs, chunk_lengths, rows, total_bytes, seed, overhead)

    lanes = len(chunk_lengths)
    best = Ceiling(None, run(make_policy("lockstep", lanes + 1)))
    candidates = sorted({*range(1, rows + 1, -(-rows // 16)), rows})
    tried: dict[tuple[int, ...], Simulated] = {}
    at = [1] * lanes
    for lane in [*reversed(range(lanes))] * (2 if lanes > 1 else 1):
        reached: list[tuple[float, int]] = []
        for candidate in candidates:
            thresholds = (*at[:lane], candidate, *at[lane + 1 :])
            if thresholds not in tried:
                tried[thresholds] = run(Fixed(thresholds))
            given = tried[thresholds]
            if gap_limit is None or given.p99_gap <= gap_limit:
                reached.append((given.bytes_per_second, candidate))
                if given.bytes_per_second > best.simulated.bytes_per_second:
                    best = Ceiling(thresholds, given)
        if reached:
            at[lane] = max(reached)[1]
    return best


def default_costs(main: Mapping[int, float], stages: int) -> Costs:
    """Every routed stage 4.7 ms and 0.3 ms a row, and the main network as given."""
    return {**dict.fromkeys(range(stages - 1), _ROUTED), stages - 1: main}


def even_lengths(bytes_per_chunk: float, stages: int) -> list[Lengths]:
    """Every routed stage chunks alike, so that a chunk of the main network has that many bytes on average."""
    return [bytes_per_chunk ** (1 / (stages - 1))] * (stages - 1)


# ── the world ─────────────────────────────────────────────────────────────────────────────────


class _World:
    """Rows, lanes and the clock."""

    def __init__(
        self,
        policy: Policy,
        costs: Costs,
        chunk_lengths: Sequence[Lengths],
        rows: int,
        seed: int,
        overhead: Mapping[int, float],
    ) -> None:
        self.now, self.finished = 0.0, 0
        self.gaps: list[float] = []
        self.fired: list[int] = []
        self.longest_wait_ticks, self.longest_wait_seconds, self.longest_tick = 0, 0.0, 0.0
        self._policy = policy
        self._main = len(chunk_lengths)
        self._cost = [_line(costs[stage]) for stage in range(self._main + 1)]
        self._overhead = _line(overhead)
        self._due = [_openings(chunk_lengths, row, seed) for row in range(rows)]
        self._runnable = list(range(rows))
        self._parked: list[list[int]] = [[] for _ in range(self._main + 1)]  # by stage; nobody parks at stage 0
        self._since = [(0, 0.0)] * rows  # tick and time at which a parked row parked
        self._last = [math.nan] * rows  # end of a row's last byte that reached the main network
        self._ticks = 0

    def tick(self) -> None:
        decision = self._policy.choose(self._situation())
        began = self.now
        match decision:
            case Through():
                self._run(0, self._take(self._runnable), through=True)
            case Step():
                self._run(0, self._take(self._runnable), through=False)
            case Fire(stage, through):
                rows = self._take(self._parked[stage])
                for row in rows:
                    tick, seconds = self._since[row]
                    self.longest_wait_ticks = max(self.longest_wait_ticks, self._ticks - tick)
                    self.longest_wait_seconds = max(self.longest_wait_seconds, began - seconds)
                self._run(stage, rows, through=through)
        self._ticks += 1
        self.longest_tick = max(self.longest_tick, self.now - began)

    def _situation(self) -> Situation:
        lanes = []
        for stage in range(1, self._main + 1):
            waiting = self._parked[stage]
            tick, seconds = self._since[waiting[0]] if waiting else (self._ticks, self.now)  # in order of parking
            lanes.append(Lane(stage, len(waiting), self._ticks - tick, self.now - seconds))
        return Situation(len(self._runnable), tuple(lanes))

    def _take(self, rows: list[int]) -> list[int]:
        if not rows:
            raise ValueError("the policy chose to run nobody")
        taken = rows[:]
        rows.clear()
        return taken

    def _run(self, stage: int, rows: list[int], through: bool) -> None:
        """One byte of rows due at `stage`: down as far as they are due (one stage where not `through`), and up."""
        outside = self._overhead(len(rows))
        self.now += outside
        self._policy.observe_outside(len(rows), outside)
        reached, level, parking = [rows], stage, list[int]()
        while level < self._main and reached[-1]:
            opened = [row for row in reached[-1] if next(self._due[row][level])]
            self._policy.saw(level, len(reached[-1]), len(opened))
            if not through:
                parking = opened
                break
            reached.append(opened)
            level += 1
        finishing = len(rows) - len(parking)
        for index, here in enumerate(reached):
            if here:
                self._cost_of(stage + index, len(here), len(here) - len(parking))
        for below in range(stage):
            self.now += DECODER_SHARE * self._cost[below](finishing)
        if len(reached) > self._main - stage and reached[-1]:
            self.fired.append(len(reached[-1]))
            for row in reached[-1]:
                if not math.isnan(self._last[row]):
                    self.gaps.append(self.now - self._last[row])
                self._last[row] = self.now
        self.finished += finishing
        if parking:
            for row in parking:
                self._since[row] = (self._ticks + 1, self.now)
            self._parked[stage + 1] += parking
            stays = set(parking)
            rows = [row for row in rows if row not in stays]
        self._runnable += rows

    def _cost_of(self, stage: int, rows: int, ascending: int) -> None:
        """A stage's own stacks; the decoder only for rows that do not park above it."""
        seconds = self._cost[stage](rows)
        if ascending < rows:
            seconds = (1 - DECODER_SHARE) * seconds + DECODER_SHARE * self._cost[stage](ascending)
        self.now += seconds
        self._policy.observe(stage, rows, seconds)


def _openings(chunk_lengths: Sequence[Lengths], row: int, seed: int) -> list[Iterator[bool]]:
    """For each routed stage, whether the row's next position opens a chunk; from the midst of a sequence."""
    return [_opens(lengths, random.Random(f"{seed} {row} {stage}")) for stage, lengths in enumerate(chunk_lengths)]


def _opens(lengths: Lengths, draw: random.Random) -> Iterator[bool]:
    if isinstance(lengths, int | float):
        while True:
            yield draw.random() * lengths < 1
    for length in islice(cycle(lengths), draw.randrange(len(lengths)), None):
        yield True
        for _ in range(length - 1):
            yield False


def _line(table: Mapping[int, float]) -> Callable[[int], float]:
    """Seconds by rows from a few known ones; nothing for no rows."""
    known = sorted(table.items())
    seen: dict[int, float] = {0: 0.0}

    def cost(rows: int) -> float:
        if rows not in seen:
            upper = next((index for index, (each, _) in enumerate(known) if each >= rows), len(known) - 1)
            upper = max(upper, min(1, len(known) - 1))
            (left, low), (right, high) = known[max(upper - 1, 0)], known[upper]
            slope = (high - low) / (right - left) if right > left else 0.0
            seen[rows] = max(low + slope * (rows - left), 0.0)
        return seen[rows]

    return cost


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order; NaN of none."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else math.nan


# ── the report ────────────────────────────────────────────────────────────────────────────────


def contenders(stages: int, limits: Limits | None = None) -> dict[str, Callable[[], Policy]]:
    """Every policy by name, made afresh for each run."""
    limits = limits or Limits()

    def aligned(share: float) -> Callable[[], Policy]:
        return lambda: Aligned(limits, share)

    return {
        "lockstep": lambda: make_policy("lockstep", stages, limits),
        **{f"aligned {share:g}": aligned(share) for share in SHARES},
        "adaptive": lambda: make_policy("adaptive", stages, limits),
    }


def compare(
    costs: Costs, chunk_lengths: Sequence[Lengths], rows: int, total_bytes: int, seed: int
) -> tuple[dict[str, Simulated], Ceiling]:
    """Every policy on the same rows, and the ceiling with no longer p99 gaps than lock-step's."""
    given = {
        name: simulate(make(), costs, chunk_lengths, rows, total_bytes, seed)
        for name, make in contenders(len(costs)).items()
    }
    limit = given["lockstep"].p99_gap
    return given, ceiling(costs, chunk_lengths, rows, total_bytes, seed, gap_limit=limit)


@dataclass(frozen=True)
class Panel:
    """One row count: (p99 chunk gap in seconds, bytes a second) by policy, lock-step among them; the ceiling's bytes a
    second."""

    points: Mapping[str, tuple[float, float]]
    ceiling: float


def plot(path: Path, title: str, panels: Mapping[int, Panel]) -> None:
    """Bytes a second against p99 chunk gap, one panel a row count."""
    if find_spec("matplotlib") is None:
        print(f"{path} is not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    figure_class = import_module("matplotlib.figure").Figure
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = figure_class(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    for index, (rows, panel) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, index)
        for name, (gap, rate) in panel.points.items():
            marker = "o" if name in ("lockstep", "adaptive") else "x"
            axes.plot(1e3 * gap, rate, marker, label=name)
        axes.axhline(panel.ceiling, color="0.6", linestyle="--", label="ceiling")
        axes.axvline(1e3 * panel.points["lockstep"][0], color="0.85")
        axes.set(title=f"rows: {rows}", xlabel="p99 chunk gap, ms", ylabel="bytes/s")
        axes.set_ylim(0, 1.1 * max(panel.ceiling, *(rate for _, rate in panel.points.values())))
        if index == 1:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def panel(given: Mapping[str, Simulated], best: Ceiling) -> Panel:
    """What was simulated, as a plot shows it."""
    points = {name: (each.p99_gap, each.bytes_per_second) for name, each in given.items()}
    return Panel(points, best.simulated.bytes_per_second)


def read_costs(path: Path) -> Costs:
    """{stage: {rows: seconds}}; JSON's keys are strings."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return {int(stage): {int(rows): float(cost) for rows, cost in costs.items()} for stage, costs in table.items()}


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.report import Row, finish, numbers, print_table  # the simulation itself does without torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--costs", type=Path, help="{stage: {rows: seconds}}, measured")
    parser.add_argument("--rows", type=numbers, default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--bytes-per-chunk", type=float, default=4.8, help="mean bytes in a chunk of the main network")
    parser.add_argument("--lengths", type=Path, help="measured chunk lengths, a list for each routed stage")
    parser.add_argument("--stages", type=int, default=2, help="of the default costs, with the main network")
    parser.add_argument("--total-bytes", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="draw throughput against p99 chunk gap")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if options.costs is not None:
        tables = {options.costs.stem: read_costs(options.costs)}
    else:
        tables = {name: default_costs(table, options.stages) for name, table in DEFAULT_MAIN.items()}
    report: list[Row] = []
    for title, costs in tables.items():
        lengths = even_lengths(options.bytes_per_chunk, len(costs))
        if options.lengths is not None:
            lengths = json.loads(options.lengths.read_text(encoding="utf-8"))
        results = {rows: compare(costs, lengths, rows, options.total_bytes, options.seed) for rows in options.rows}
        lines: list[list[str]] = []
        for rows, (given, best) in results.items():
            thresholds = "lockstep" if best.thresholds is None else ", ".join(map(str, best.thresholds))
            named = {**given, f"ceiling ({thresholds})": best.simulated}
            base, lockstep = f"{title} {rows} lockstep", given["lockstep"]
            for name, each in named.items():
                label = f"{title} {rows} {name.split(' (')[0]}"
                figures = (
                    ("", "bytes/s", each.bytes_per_second, lockstep.bytes_per_second),
                    (" p50 gap", "ms", 1e3 * each.p50_gap, 1e3 * lockstep.p50_gap),
                    (" p99 gap", "ms", 1e3 * each.p99_gap, 1e3 * lockstep.p99_gap),
                )
                for word, unit, value, to in figures:
                    report.append(Row(label + word, value, unit, base + word, value / to))
                (_, _, rate, rate_to), (_, _, p50, _), (_, _, p99, p99_to) = figures
                measured = [f"{rate:.1f}", f"{rate / rate_to:.2f}×", f"{p50:.0f}", f"{p99:.0f}", f"{p99 / p99_to:.2f}×"]
                lines.append([f"{rows} {name}", *measured, f"{each.mean_rows_per_fire:.1f}"])
        print_table(
            f"{title}: rows and policy, {options.total_bytes} bytes",
            ["", "bytes/s", "÷ lockstep", "p50 gap ms", "p99 gap ms", "÷ lockstep", "rows a main run"],
            lines,
        )
        if options.plot is not None:
            named_path = options.plot if len(tables) == 1 else options.plot.with_stem(f"{options.plot.stem}-{title}")
            plot(named_path, title, {rows: panel(*result) for rows, result in results.items()})
    finish("policy_sim", report, options.json)


if __name__ == "__main__":
    main()
