"""Batching policies on the engine: bytes a second and chunk gaps of lock-step, aligned and adaptive, and the ceiling.

    hnet bench batching [--model demo] [--rows 1,4,8,16,32] [--rounds 3] [--max-tokens 96] [--plot FILE] [--json FILE]

A policy for each number of rows lives through the whole run, since adaptive learns as it serves, and has served a
little before anything counts. Its engines are made anew for each round, in another order: the one made first finds the
better memory, by as much as three parts in a hundred. The policies' engines run the same requests, a sixteenth of them
at a time in turn, so that other work on the machine falls on all alike; the clock of each stands while others have
their turn. That is why waits are bounded here by ticks alone, not by seconds. What counts of a run, `course.py` says.
Random weights chunk at a stated mean, 4.8 bytes with one routed stage and 7.0 with two (--bytes-per-chunk says
otherwise); the demo's router decides itself.

The ceiling is the simulator's (`policy_sim.py`): the best fixed thresholds with p99 gaps no longer than lock-step's,
for chunks as lock-step met them (drawn ones: as long on average), what the stages' own stacks cost in the same rounds
with every row due, and the time that lock-step's ticks spent outside them. Its ratio is to lock-step simulated
likewise. It takes DECODER_SHARE for granted. Ratios are of medians over rounds, and their spread is the least and most
of any round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Literal, get_args

from benchmarks.course import Counted, Course, TooShort
from benchmarks.models import BOS, Network, Rows, Variant, again, build, read_weights, text
from benchmarks.policy_sim import Ceiling, Lengths, Panel, Simulated, ceiling, plot, quantile, simulate
from benchmarks.report import Row, finish, numbers, options_parser, print_table
from benchmarks.roofline import BYTES_PER_CHUNK
from hnet_runtime.engine.building import default_threads
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Request, SamplingParams
from hnet_runtime.engine.policies import Limits, Policy, PolicyName, make_policy
from hnet_runtime.state.rows import PAGE

MODELS = ("demo", "random:hnet_1stage_L", "random:hnet_2stage_L")
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
COST_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)  # kernels work on several rows at once: odd numbers cost more
LEARNING_BYTES = 40  # a row, before anything counts; adaptive looks at what it measured every 32 ticks
MOST_REPEATS = 8
COST_POSITIONS = 24  # of every stage, before a step whose cost is taken: about what a run's main network has seen
DRAWN_PROMPT = 8  # bytes, where the text does not matter
PROMPT = BOS + b"It was a bright cold day in April, and the clocks were "
SEED = 1
TURNS = 16  # of a run
UNBOUNDED = 1e6  # seconds


@dataclass(frozen=True)
class Effort:
    """How much is run. max_tokens: bytes a row; repeats: of each cost before each run, and more where a quarter of a
    second has room for them; simulated: bytes of a simulation."""

    rows: tuple[int, ...]
    rounds: int
    max_tokens: int
    repeats: int = 1
    simulated: int = 20_000


# ── what is run ───────────────────────────────────────────────────────────────────────────────


def prompts(rows: int, drawn: bool) -> list[bytes]:
    """One prompt a row, all different; short ones where boundaries are drawn."""
    each = [f"{index:03d} ".encode() for index in range(rows)]
    return [BOS + part + text(DRAWN_PROMPT - 4)[1:] if drawn else PROMPT + part for part in each]


def policies_for(model: Network) -> dict[str, Policy]:
    return {name: make_policy(name, len(model.config.stages), Limits(max_wait_seconds=UNBOUNDED)) for name in POLICIES}


def engines_on(
    model: Network,
    name: str,
    rows: int,
    max_model_len: int,
    variant: Variant,
    policies: Mapping[str, Policy],
    turn: int,
) -> dict[str, Engine]:
    """One of each policy, all on one model, without a prefix cache: every round reads its prompts. They have no more
    rows than run, since drawn boundaries are a row's: so all engines meet the same ones in every round. turn: who is
    made first."""
    config = EngineConfig(
        max_num_seqs=rows,
        max_model_len=max_model_len + 2 * PAGE,  # rows are admitted as long as each has a page to spare
        threads=variant.threads,
        kernels=variant.kernels,
        quantization=variant.quantization,
        prefix_cache_memory=0,
    )
    names = list(policies)
    order = names[turn % len(names) :] + names[: turn % len(names)]
    made = {policy: Engine(model, name, config, policy=policies[policy]) for policy in order}
    return {policy: made[policy] for policy in names}


def serve(engines: Mapping[str, Engine], texts: Sequence[bytes], max_tokens: int, seed: int) -> dict[str, Course]:
    """The same requests on each engine, all at once, until the first of them ends; the engines run in turn."""
    params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, utf8="raw", return_chunks=True)
    requests = [Request(request_id=str(index), prompt=prompt, params=params) for index, prompt in enumerate(texts)]
    lengths = {each.request_id: len(each.prompt) for each in requests}
    courses = {policy: Course(lengths, len(engine.info.stages)) for policy, engine in engines.items()}
    for engine in engines.values():
        for request in requests:
            engine.submit(request)
    in_a_turn = len(texts) * max(max_tokens // TURNS, 1)
    while running := [policy for policy, course in courses.items() if not course.is_over]:
        for policy in running:
            _advance(engines[policy], courses[policy], courses[policy].gained + in_a_turn)
    for engine in engines.values():
        for request in requests:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.tick()
    return courses


def _advance(engine: Engine, course: Course, until: int) -> None:
    """Ticks until its rows have gained so many bytes, or one has ended."""
    while course.gained < until and not course.is_over:
        started = time.perf_counter()
        tick = engine.tick()
        course.take(tick, time.perf_counter() - started)


class StageCosts:
    """Seconds of each stage's own stacks by rows, of steps in which every row is due in every stage."""

    def __init__(self, model: Network, row_counts: Sequence[int], steps: int) -> None:
        """model: one that opens a chunk with every byte; steps: at most so many of each number of rows."""
        self._counts = tuple(row_counts)
        self._rows = Rows(model, max(self._counts), 2 * COST_POSITIONS)
        self._rows.run([text(COST_POSITIONS, row) for row in self._rows.rows])
        self._found: dict[int, dict[int, list[float]]] = {
            stage: {count: [] for count in self._counts} for stage in range(len(model.config.stages))
        }
        self._left = steps
        self._step(record=False)

    def measure(self, least: int, most: int, seconds: float) -> None:
        """So many times, as many as take `seconds`."""
        until = time.perf_counter() + seconds
        for turn in range(min(most, self._left)):
            if turn >= least and time.perf_counter() >= until:
                break
            self._step(record=True)
            self._left -= 1

    def _step(self, record: bool) -> None:
        for count in self._counts:
            self._rows.rewind(COST_POSITIONS)  # attention reads as many positions each time
            _, result = self._rows.run([b"a"] * count, self._rows.rows[:count])
            for work in result.work if record else ():
                self._found[work.stage][count].append(work.seconds)

    def medians(self) -> dict[int, dict[int, float]]:
        return {
            stage: {count: median(seconds) for count, seconds in found.items()} for stage, found in self._found.items()
        }


@dataclass(frozen=True)
class Foreseen:
    """Policies and the ceiling, simulated for one number of rows."""

    lockstep: Simulated
    adaptive: Simulated
    ceiling: Ceiling

    @property
    def ratio(self) -> float:
        return self.ceiling.simulated.bytes_per_second / self.lockstep.bytes_per_second


def foresee(
    costs: Mapping[int, Mapping[int, float]],
    lengths: Sequence[Lengths],
    rows: int,
    total_bytes: int,
    outside: Mapping[int, float],
) -> Foreseen:
    """outside: {rows: seconds} of a tick that no stage takes."""
    run = (costs, lengths, rows, total_bytes, SEED)
    lockstep, adaptive = (
        simulate(make_policy(name, len(costs)), *run, overhead=outside) for name in ("lockstep", "adaptive")
    )
    return Foreseen(lockstep, adaptive, ceiling(*run, gap_limit=lockstep.p99_gap, overhead=outside))


# ── what came out ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ratio:
    """Of medians over rounds, and the least and most of a round."""

    value: float
    least: float
    most: float

    def over(self, other: float) -> Ratio:
        return Ratio(self.value / other, self.least / other, self.most / other)

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.least:.2f}–{self.most:.2f})"


@dataclass(frozen=True)
class Compared:
    """One number of rows: each policy's runs, round by round, what was foreseen, and the bytes in a chunk of the main
    network that lock-step met."""

    runs: Mapping[str, Sequence[Counted]]
    foreseen: Foreseen
    bytes_per_chunk: float

    def rate(self, policy: str) -> float:
        """Bytes a second."""
        return median(run.rate for run in self.runs[policy])

    def gap(self, policy: str, share: float) -> float:
        """Seconds between ends of bytes that reached the main network, of all rounds together; NaN where none did."""
        return quantile(sorted(gap for run in self.runs[policy] for gap in run.gaps), share)

    def rate_ratio(self, policy: str) -> Ratio:
        """Bytes a second ÷ those of lock-step."""
        by_round = [each.rate / base.rate for each, base in self._pairs(policy)]
        return Ratio(self.rate(policy) / self.rate("lockstep"), min(by_round), max(by_round))

    def gap_ratio(self, policy: str) -> Ratio:
        """p99 chunk gap ÷ that of lock-step."""
        by_round = [
            quantile(sorted(each.gaps), 0.99) / quantile(sorted(base.gaps), 0.99)
            for each, base in self._pairs(policy)
            if each.gaps and base.gaps
        ]
        value = self.gap(policy, 0.99) / self.gap("lockstep", 0.99)
        return Ratio(value, min(by_round, default=value), max(by_round, default=value))

    def ceiling_share(self) -> Ratio:
        """Adaptive's ratio ÷ the ceiling's."""
        return self.rate_ratio("adaptive").over(self.foreseen.ratio)

    def _pairs(self, policy: str) -> list[tuple[Counted, Counted]]:
        return list(zip(self.runs[policy], self.runs["lockstep"], strict=True))


@dataclass(frozen=True)
class Target:
    """What a figure should be: at least, or at most, `limit`."""

    name: str
    figure: Ratio
    limit: float
    kind: Literal["≥", "≤"] = "≥"

    @property
    def verdict(self) -> str:
        """Of the medians; one that is missed by less than rounds differ is missed, and says so."""
        figure, holds = self.figure, self._holds
        if holds(figure.value):
            return "met"
        return "missed, within the spread" if holds(figure.least) or holds(figure.most) else "missed"

    def _holds(self, value: float) -> bool:
        return value >= self.limit if self.kind == "≥" else value <= self.limit


def targets_of(model: str, compared: Mapping[int, Compared]) -> list[Target]:
    """Those that hold for a model; of what should hold for every number of rows, the worst."""
    large = {8: 1.7, 16: 1.5} if model.endswith("_L") else {}
    named = {rows: each.rate_ratio("adaptive") for rows, each in compared.items()}
    targets = [
        Target(f"{rows} rows: adaptive ÷ lock-step", named[rows], least)
        for rows, least in large.items()
        if rows in named
    ]
    worst = min(named, key=lambda rows: named[rows].value)
    targets.append(Target(f"adaptive ÷ lock-step, worst: {worst} rows", named[worst], 1.0))
    shares = {rows: each.ceiling_share() for rows, each in compared.items()}
    worst = min(shares, key=lambda rows: shares[rows].value)
    targets.append(Target(f"adaptive's ÷ ceiling's, worst: {worst} rows", shares[worst], 0.9))
    gaps = {rows: each.gap_ratio("adaptive") for rows, each in compared.items()}
    worst = max(gaps, key=lambda rows: gaps[rows].value)
    targets.append(Target(f"p99 chunk gap ÷ lock-step's, worst: {worst} rows", gaps[worst], 1.0, "≤"))
    return targets


def rows_of(name: str, costs: Mapping[int, Mapping[int, float]], compared: Mapping[int, Compared]) -> list[Row]:
    """The figures of a model. Lock-step with the same rows is the base."""
    report = [
        Row(
            f"{name} stage {stage} rows={rows}", 1e3 * seconds, "ms", f"{name} stage {stage} rows=1", seconds / table[1]
        )
        for stage, table in costs.items()
        for rows, seconds in table.items()
    ]
    for rows, each in compared.items():
        prefix, foreseen = f"{name} rows={rows}", each.foreseen
        for policy in each.runs:
            figures = (
                ("", "bytes/s", each.rate(policy), each.rate("lockstep")),
                (" p50 gap", "ms", 1e3 * each.gap(policy, 0.5), 1e3 * each.gap("lockstep", 0.5)),
                (" p99 gap", "ms", 1e3 * each.gap(policy, 0.99), 1e3 * each.gap("lockstep", 0.99)),
            )
            report += [
                Row(f"{prefix} {policy}{word}", value, unit, f"{prefix} lockstep{word}", value / base)
                for word, unit, value, base in figures
            ]
        base = foreseen.lockstep.bytes_per_second
        report.append(
            Row(f"{prefix} lockstep simulated", base, "bytes/s", f"{prefix} lockstep", base / each.rate("lockstep"))
        )
        for word, simulated in (("adaptive simulated", foreseen.adaptive), ("ceiling", foreseen.ceiling.simulated)):
            rate = simulated.bytes_per_second
            report.append(Row(f"{prefix} {word}", rate, "bytes/s", f"{prefix} lockstep simulated", rate / base))
        report += [
            Row(f"{prefix} adaptive's ratio ÷ the ceiling's", each.ceiling_share().value, "1"),
            Row(f"{prefix} bytes a chunk", each.bytes_per_chunk, "bytes"),
        ]
    return report


def print_costs(title: str, costs: Mapping[int, Mapping[int, float]]) -> None:
    shown = [rows for rows in costs[0] if rows > 1 and rows.bit_count() == 1]
    lines = [
        [f"{stage}{' (main)' if stage == max(costs) else ''}", f"{1e3 * table[1]:.2f}"]
        + [f"{table[rows] / table[1]:.2f}×" for rows in shown]
        for stage, table in costs.items()
    ]
    columns = [f"{rows} rows" for rows in shown]
    print_table(f"{title}: a step of each stage, all rows due", ["stage", "1 row, ms", *columns], lines)


def print_policies(title: str, compared: Mapping[int, Compared]) -> None:
    lines: list[list[str]] = []
    for rows, each in compared.items():
        foreseen = each.foreseen
        for policy, runs in each.runs.items():
            line = [f"{rows} {policy}", f"{each.rate(policy):.1f}", str(each.rate_ratio(policy))]
            line += [f"{1e3 * each.gap(policy, share):.1f}" for share in (0.5, 0.99)] + [str(each.gap_ratio(policy))]
            lines.append([*line, f"{median(run.outside / run.seconds for run in runs):.2f}"])
        of_ceiling = f"{rows} adaptive ÷ ceiling {foreseen.ratio:.2f}"
        lines.append([of_ceiling, "", str(each.ceiling_share()), "", "", "", ""])
    columns = ["", "bytes/s", "÷ lock-step", "p50 gap ms", "p99 gap ms", "÷ lock-step", "outside"]
    print_table(f"{title}: rows and policy; share of the time outside all stages", columns, lines)


def print_targets(title: str, targets: Sequence[Target]) -> None:
    lines = [[each.name, f"{each.kind} {each.limit:g}", str(each.figure), each.verdict] for each in targets]
    print_table(f"{title}: targets", ["", "target", "is (rounds)", ""], lines)


def panels_of(compared: Mapping[int, Compared]) -> dict[int, Panel]:
    """The ceiling as a multiple of the lock-step that was measured."""
    return {
        rows: Panel(
            {policy: (each.gap(policy, 0.99), each.rate(policy)) for policy in each.runs},
            each.foreseen.ratio * each.rate("lockstep"),
        )
        for rows, each in compared.items()
    }


# ── a model ───────────────────────────────────────────────────────────────────────────────────


def measure(
    model: str, variant: Variant, threads: int | None, effort: Effort
) -> tuple[str, dict[int, dict[int, float]], dict[int, Compared]]:
    """What the model is, in words; its stages' costs; and the policies by number of rows. Raises TooShort."""
    config, weights = read_weights(model, variant.dtype)
    chunking = variant.bytes_per_chunk
    if chunking is None and model.startswith("random:"):
        chunking = BYTES_PER_CHUNK.get(config.num_routed_stages)
    variant = replace(variant, threads=threads or default_threads(config), bytes_per_chunk=chunking)
    network = build(config, weights, variant)
    due = again(network, weights, replace(variant, bytes_per_chunk=1.0))
    drawn, most = chunking is not None, max(effort.rows)
    longest = max(map(len, prompts(most, drawn))) + max(effort.max_tokens, LEARNING_BYTES)
    policies = {rows: policies_for(network) for rows in effort.rows}
    counts = [count for count in COST_ROWS if count == 1 or count <= most]
    costs = StageCosts(due, counts, MOST_REPEATS * effort.rounds * len(effort.rows))
    for rows in effort.rows:
        engines = engines_on(network, model, rows, longest, variant, policies[rows], 0)
        serve(engines, prompts(rows, drawn), LEARNING_BYTES, SEED)
    runs: dict[int, dict[str, list[Counted]]] = {rows: {policy: [] for policy in POLICIES} for rows in effort.rows}
    met: dict[int, list[list[int]]] = {rows: [[] for _ in range(config.num_routed_stages)] for rows in effort.rows}
    for turn in range(effort.rounds):
        for rows in effort.rows:
            costs.measure(effort.repeats, MOST_REPEATS, seconds=0.25)
            engines = engines_on(network, model, rows, longest, variant, policies[rows], turn)
            courses = serve(engines, prompts(rows, drawn), effort.max_tokens, SEED + turn)
            for policy, course in courses.items():
                runs[rows][policy].append(course.counted())
            for stage, found in enumerate(courses["lockstep"].chunk_lengths()):
                met[rows][stage] += found
    medians = costs.medians()
    outside = {
        rows: median(run.outside / run.ticks for run in by_policy["lockstep"]) for rows, by_policy in runs.items()
    }
    compared: dict[int, Compared] = {}
    for rows in effort.rows:
        if not all(met[rows]):
            raise TooShort(f"{rows} rows: lock-step met no whole chunk: it takes more bytes a row")
        means = [fmean(found) for found in met[rows]]
        # Drawn ones are geometric: rows that go through one short list of them would keep in step with each other.
        lengths: Sequence[Lengths] = means if drawn else met[rows]
        foreseen = foresee(medians, lengths, rows, effort.simulated, outside)
        compared[rows] = Compared(runs[rows], foreseen, prod(means))
    info = engines["lockstep"].info
    said = f"{model}, {variant.quantization or info.dtype}, {info.kernels}, {variant.threads} thread(s)"
    said += f", {chunking:g} bytes a chunk" if chunking is not None else ""
    return said, medians, compared


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--rows", type=numbers, help="rows that decode together (default 1,4,8,16,32)")
    parser.add_argument("--rounds", type=int, help="times that everything is run (default 3)")
    parser.add_argument("--max-tokens", type=int, help="bytes a row (default 512 for the demo, 96 for others)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: by the model's width)")
    parser.add_argument("--plot", type=Path, help="draw throughput against p99 chunk gap")
    parser.add_argument("--quick", action="store_true", help="the demo alone, few rows and bytes: to see that it runs")
    options = parser.parse_args(arguments)
    models = options.model or (MODELS[:1] if options.quick else MODELS)
    report: list[Row] = []
    for model in models:
        # Chunking that is asked for holds for models that are asked for, and for random ones.
        chunking = options.bytes_per_chunk if options.model or model.startswith("random:") else None
        variant = Variant(options.dtype, options.kernels, options.quantization, 1, chunking)
        effort = effort_of(options, model, parser)
        try:
            said, costs, compared = measure(model, variant, options.threads, effort)
        except TooShort as error:
            parser.error(f"--max-tokens {effort.max_tokens}, {model}: {error}")
        print_costs(said, costs)
        print_policies(said, compared)
        print_targets(said, targets_of(model, compared))
        name = f"{model} {options.quantization}" if options.quantization else model
        report += rows_of(name, costs, compared)
        if options.plot is not None:
            path = options.plot
            if len(models) > 1:
                path = path.with_stem(f"{path.stem}-{model.rpartition(':')[2]}")
            plot(path, said, panels_of(compared))
    finish("batching", report, options.json)


def effort_of(options: argparse.Namespace, model: str, parser: argparse.ArgumentParser) -> Effort:
    """What the options ask for, or what suits the model; ends with an error that names what is out of range."""
    quick: bool = options.quick
    rows = tuple(options.rows or ((1, 4) if quick else (1, 4, 8, 16, 32)))
    rounds = (1 if quick else 3) if options.rounds is None else options.rounds
    max_tokens = options.max_tokens
    if max_tokens is None:
        max_tokens = 48 if quick else 512 if model == "demo" else 96
    for name, value, least in (("--rows", min(rows), 1), ("--rounds", rounds, 1), ("--max-tokens", max_tokens, 16)):
        if value < least:
            parser.error(f"{name} must be at least {least}, not {value}")
    if quick:
        return Effort(rows, rounds, max_tokens, repeats=2, simulated=2000)
    return Effort(rows, rounds, max_tokens)


if __name__ == "__main__":
    main()
