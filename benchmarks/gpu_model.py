"""What decoding can give on a GPU by its data sheet: bytes and launches of a step, and bytes a second. Nothing is run.

    hnet bench gpu-model [--model hnet_1stage_L] [--rows 1,8,64] [--launch-us 2] [--report docs/gpu-model.md]

Weights, state, and keys and values are counted from the shapes of a model, launches from its captured steps on tensors
without memory; boundaries are drawn independently. Lock-step is one captured step through all stages a byte; aligned is
rows waiting at the boundary until it is best to run the next stage for them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Row, numbers, print_table, write_json
from hnet_runtime.config import ModelConfig, official_names
from hnet_runtime.engine.graphs import buckets
from hnet_runtime.gpu_roofline import (
    CONTEXT,
    H100,
    H200,
    LAUNCH_SECONDS,
    Gpu,
    Kind,
    Shapes,
    aligned_rate,
    boundary_rates,
    launches_of,
    lockstep_rate,
    step_seconds,
)
from hnet_runtime.gpu_tape import Tape, tape
from hnet_runtime.model.captured import StepKey, step_kinds

GPUS = (H100, H200)
MOST_ROWS = 128
THROUGH: Kind = (0, False)


@dataclass(frozen=True)
class Point:
    """A model's decoding with so many rows on a GPU. Rates in bytes/s; of a lock-step step: seconds, and the share of
    them that launches take."""

    rows: int
    lockstep: float
    aligned: float
    seconds: float
    launch_share: float


@dataclass(frozen=True)
class Sheet:
    """All that is computed of one model."""

    name: str
    shapes: Shapes
    tapes: dict[Kind, Tape]
    points: dict[Gpu, list[Point]]


def compute(
    name: str, config: ModelConfig, rows: Sequence[int], chunks: list[float] | None, context: int, launch_seconds: float
) -> Sheet:
    shapes = Shapes(config, boundary_rates(config, chunks), context)
    tapes = {kind: tape(config, StepKey(2, *kind)) for kind in step_kinds(len(config.stages))}
    launches = launches_of(config)
    points: dict[Gpu, list[Point]] = {}
    for gpu in GPUS:
        points[gpu] = []
        for count in rows:
            seconds = step_seconds(shapes.traffic(THROUGH, count), launches(THROUGH, count), gpu, launch_seconds)
            points[gpu].append(
                Point(
                    count,
                    lockstep_rate(shapes, count, gpu, launches, launch_seconds),
                    aligned_rate(shapes, count, gpu, launches, launch_seconds),
                    seconds,
                    launches(THROUGH, count) * launch_seconds / seconds,
                )
            )
    return Sheet(name, shapes, tapes, points)


# ── tables ────────────────────────────────────────────────────────────────────────────────────

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, lines."""


def traffic_table(sheets: Sequence[Sheet]) -> Table:
    lines = []
    for sheet in sheets:
        shapes = sheet.shapes
        through, byte, main = (shapes.traffic(kind, 1) for kind in (THROUGH, (0, True), (shapes.main, False)))
        weights = [f"{(each.weights + each.fp32_weights) / 1e9:.2f}" for each in (through, byte, main)]
        rows = [f"{each / 1e6:.1f}" for each in (through.fp32_weights, through.state, through.kv, main.kv)]
        lines.append([sheet.name, f"{shapes.config.num_parameters / 1e9:.2f}", *weights, *rows])
    columns = ["model", "G parameters", "weights, GB", "byte step, GB", "main step, GB", "in fp32, MB"]
    columns += ["state, MB", "KV, MB", "main KV, MB"]
    return "What a step moves", columns, lines


def launches_table(sheets: Sequence[Sheet]) -> Table:
    lines = []
    for sheet in sheets:
        for (stage, parks), found in sheet.tapes.items():
            kind = f"stage {stage}" + (", opening rows wait" if parks else " and on")
            ours = sum(found.ours.values())
            lines.append([sheet.name, kind, str(found.launches), str(ours), str(found.products), str(found.others)])
    return "Launches of a step", ["model", "step", "launches", "Triton", "products", "others"], lines


def rates_table(sheet: Sheet, gpu: Gpu) -> Table:
    columns = ["rows", "weights, GB", "state, GB", "KV, GB", "step, ms", "launches'"]
    columns += ["lock-step, bytes/s", "aligned, bytes/s", "ratio"]
    lines = []
    for point in sheet.points[gpu]:
        moved = sheet.shapes.traffic(THROUGH, point.rows)
        parts = (moved.weights + moved.fp32_weights, moved.state, moved.kv)
        line = [str(point.rows), *(f"{part / 1e9:.3f}" for part in parts)]
        line += [f"{1e3 * point.seconds:.2f}", f"{point.launch_share:.0%}"]
        lines.append([*line, f"{point.lockstep:.0f}", f"{point.aligned:.0f}", f"{point.aligned / point.lockstep:.2f}×"])
    chunk = 1 / math.prod(sheet.shapes.rates)
    return f"{sheet.name} on {gpu.name}, {chunk:.1f} bytes a chunk of the main network", columns, lines


def markdown(table: Table) -> list[str]:
    title, columns, lines = table
    return [
        f"## {title}",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
    ]


def figures(sheet: Sheet) -> list[Row]:
    found = [Row(f"{sheet.name} launches of a step", sheet.tapes[THROUGH].launches, "launches")]
    for gpu, points in sheet.points.items():
        for point in points:
            name = f"{sheet.name} {gpu.name} rows={point.rows}"
            found += [
                Row(f"{name} lockstep", point.lockstep, "bytes/s, computed"),
                Row(
                    f"{name} aligned",
                    point.aligned,
                    "bytes/s, computed",
                    f"{name} lockstep",
                    point.aligned / point.lockstep,
                ),
            ]
    return found


def page(sheets: Sequence[Sheet], command: str, context: int, launch_seconds: float) -> str:
    """docs/gpu-model.md."""
    gpus = "; ".join(
        f"{gpu.name}: {gpu.bandwidth / 1e12:g} TB/s, {gpu.bf16 / 1e12:g} TFLOP/s in bf16, {gpu.fp32 / 1e12:g} in fp32"
        for gpu in GPUS
    )
    said = f"""# Decoding on a GPU, computed, not measured

Written by `{command}`. Every figure is **computed, not measured**:
from the shapes of the models, from the launches of their captured steps, counted on tensors without memory, and from
data sheets. They are what a measurement is held against (`hnet_runtime.gpu_roofline.expected_rate`), and no promise.

What is taken:

- {gpus}.
  All of the bandwidth is had.
- A step takes the time of its memory traffic, or of its products where those are slower, and for every launch in the
  replayed graph {1e6 * launch_seconds:g} µs. The latter is an assumption (`--launch-us`) and weighs much:
  *launches'* is its share of a lock-step step.
- Weights are bf16. Norms, convolutions, the router's projections and `residual_proj` are read in fp32, as they are
  kept; SSM state and the smoothed value are fp32; state is read and written.
- Every row has read {context} bytes (`--context`). Activations stay in the cache, padding rows cost no traffic, and the
  host costs nothing between steps.
- Boundaries are independent, and all routed stages chunk alike (`--bytes-per-chunk`).
- **Lock-step** replays one step through all stages a byte. Its shapes do not depend on data, so it reads the main
  network whether or not a row opened a chunk. **Aligned**: rows that open a chunk wait, every lane at its best
  threshold, by the Markov chain that the adaptive policy plans with. Rows are whole buckets.

State and KV in the first table are a row's, expected, in a step through all stages; *main KV* is a row's in a step of
the main network alone. *Triton* in the second are our kernels; *products* are torch's, one launch each (a split one
takes two); *others* are what else torch launches.
"""
    lines = [said, *markdown(traffic_table(sheets)), *markdown(launches_table(sheets))]
    for sheet in sheets:
        for gpu in GPUS:
            lines += markdown(rates_table(sheet, gpu))
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="an official name or a configuration's file; again for more")
    parser.add_argument("--rows", type=numbers, default=buckets(MOST_ROWS, MOST_ROWS))
    parser.add_argument(
        "--bytes-per-chunk", help="of the main network, or positions a chunk of every routed stage: 2.5,3"
    )
    parser.add_argument("--context", type=int, default=CONTEXT, help="bytes that every row has read")
    parser.add_argument("--launch-us", type=float, default=1e6 * LAUNCH_SECONDS, help="assumed of a launch in a graph")
    parser.add_argument("--report", type=Path, help="also write the page of Markdown")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    chunks = [float(each) for each in options.bytes_per_chunk.split(",")] if options.bytes_per_chunk else None
    sheets = []
    for name in options.model or official_names():
        config = ModelConfig.official(name) if name in official_names() else ModelConfig.from_file(name)
        sheets.append(compute(Path(name).stem, config, options.rows, chunks, options.context, 1e-6 * options.launch_us))
    rates = [rates_table(sheet, gpu) for sheet in sheets for gpu in GPUS]
    for title, columns, lines in (traffic_table(sheets), launches_table(sheets), *rates):
        print_table(f"{title} (computed, not measured)", columns, lines)
    if options.json is not None:
        write_json(options.json, "gpu_model", [row for sheet in sheets for row in figures(sheet)])
    if options.report is not None:
        given = [f"--model {name}" for name in options.model or ()]
        given += [f"--bytes-per-chunk {options.bytes_per_chunk}"] if chunks else []
        command = " ".join(["hnet bench gpu-model", *given, "--report", str(options.report)])
        options.report.write_text(page(sheets, command, options.context, 1e-6 * options.launch_us), encoding="utf-8")


if __name__ == "__main__":
    main()
