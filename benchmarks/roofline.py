"""One row against the roofline, and what a main step costs for more rows than one.

    hnet bench roofline [--model random:hnet_1stage_L] [--dtype bfloat16] [--quantization int8] [--threads 1,2]

A row of random weights chunks at a stated mean (RouterOverride), since only trained ones chunk as text does. Share of
the roofline: bytes of weights that the steps of the run really read (a stage's once for every step that reached it) ÷
read bandwidth measured before and after ÷ the time, the median over segments of the run. The cost of a main step is
taken with every row due, the numbers of rows in turn.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

from benchmarks.bandwidth import Buffer
from benchmarks.models import Network, Rows, Variant, again, build, read_weights, stage_bytes, text
from benchmarks.report import Row, finish, numbers, options_parser, print_table

BYTES_PER_CHUNK = {1: 4.8, 2: 7.0}  # by routed stages: what the published models take on English
PROMPT, SEGMENT = 64, 16  # bytes


@dataclass(frozen=True)
class Share:
    """Of one row: bytes decoded a second, share of the roofline, and bandwidth; medians over the run's segments."""

    rate: float
    fraction: float
    bandwidth: float


def share(model: Network, weights: Mapping[str, Tensor], steps: int, threads: int) -> Share:
    """The run in segments, each with the bandwidth measured before and after it, since others use the machine too."""
    per_stage = stage_bytes(model, weights)
    buffer = Buffer(sum(per_stage))
    data = text(PROMPT + SEGMENT + steps)
    row = Rows(model, 1, len(data))
    row.run([data[:PROMPT]])
    rates, fractions, bandwidths = [], [], []
    before = buffer.bandwidth(threads, 2)
    for begin in range(PROMPT, len(data), SEGMENT):
        end = min(begin + SEGMENT, len(data))
        seconds, read = 0.0, 0
        for at in range(begin, end):
            took, result = row.run([data[at : at + 1]])
            seconds += took
            read += sum(per_stage[work.stage] for work in result.work)
        after = buffer.bandwidth(threads, 2)
        if begin > PROMPT:  # the first segment warms up
            bandwidths.append(max(before, after))
            rates.append((end - begin) / seconds)
            fractions.append(read / bandwidths[-1] / seconds)
        before = after
    return Share(median(rates), median(fractions), median(bandwidths))


def main_step_seconds(model: Network, row_counts: list[int], rounds: int) -> dict[int, float]:
    """Median seconds in the main network of a step in which that many rows are all due."""
    rows = Rows(model, max(row_counts), 16 + len(row_counts) * (rounds + 1))
    rows.run([text(8, row) for row in rows.rows])
    found: dict[int, list[float]] = {count: [] for count in row_counts}
    for turn in range(rounds + 1):
        for count in row_counts:
            _, result = rows.run([b"a"] * count, rows.rows[:count])
            if turn:
                found[count].append(result.work[-1].seconds)
    return {count: median(seconds) for count, seconds in found.items()}


def measure(
    model: str, variant: Variant, thread_counts: list[int], row_counts: list[int], steps: int, rounds: int
) -> list[Row]:
    config, weights = read_weights(model, variant.dtype)
    chunking = variant.bytes_per_chunk or BYTES_PER_CHUNK.get(config.num_routed_stages)
    first = build(config, weights, variant)
    kind = variant.quantization or str(first.dtype).removeprefix("torch.")
    report, table = [], []
    for threads in thread_counts:
        decoding = again(first, weights, replace(variant, threads=threads, bytes_per_chunk=chunking))
        one = share(decoding, weights, steps, threads)
        due = again(first, weights, replace(variant, threads=threads, bytes_per_chunk=1.0))
        seconds = main_step_seconds(due, row_counts, rounds)
        name = f"{model} {kind} threads={threads}"
        report += [
            Row(f"{name} bandwidth", one.bandwidth / 1e9, "GB/s"),
            Row(f"{name} roofline", one.rate / one.fraction, "bytes/s"),
            Row(f"{name} one row", one.rate, "bytes/s", f"{name} roofline", one.fraction),
        ]
        report += [
            Row(f"{name} main step rows={n}", 1e3 * s, "ms", f"{name} main step rows=1", s / seconds[row_counts[0]])
            for n, s in seconds.items()
        ]
        costs = [f"{s / seconds[row_counts[0]]:.2f}×" for s in seconds.values()][1:]
        own = f"{1e3 * seconds[row_counts[0]]:.1f}"
        table.append(
            [str(threads), f"{one.bandwidth / 1e9:.1f}", f"{one.rate:.1f}", f"{one.fraction:.2f}", own, *costs]
        )
    per_chunk = f", {chunking:g} bytes a chunk" if chunking else ""
    print_table(
        f"{model}, {kind}{per_chunk}: one row, and a main step of more rows against one",
        ["threads", "GB/s read", "bytes/s", "of roofline", "main step ms", *(f"{n} rows" for n in row_counts[1:])],
        table,
    )
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers of CPU threads")
    parser.add_argument("--rows", default="1,4,8,16", help="rows of a main step; 1 first")
    parser.add_argument("--steps", type=int, default=96, help="bytes that one row decodes")
    parser.add_argument("--rounds", type=int, default=7, help="main steps of each number of rows")
    options: argparse.Namespace = parser.parse_args(arguments)
    models = options.model or ["random:hnet_1stage_L", "random:hnet_2stage_XL"]
    kinds = [options.quantization] if options.quantization else [None, "int8"]
    report: list[Row] = []
    for model in models:
        for quantization in kinds:
            variant = Variant(options.dtype, options.kernels, quantization, 1, options.bytes_per_chunk)
            report += measure(
                model,
                variant,
                sorted(set(numbers(options.threads))),
                numbers(options.rows),
                options.steps,
                options.rounds,
            )
    finish("roofline", report, options.json)


if __name__ == "__main__":
    main()
