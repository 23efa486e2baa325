"""What it costs to hold completions to a constraint, and what forced bytes save.

    hnet bench structured [--model demo] [--rows 1,16] [--json FILE]

The same requests in one engine, in turn: free; held to a table of states (a regular expression that allows every
text); held to a grammar that llguidance follows (a long JSON string), its masks made where the byte is taken, and in a
thread; and held to an expression of which eight bytes in ten have to come, taken ahead and run as spans, and one by
one. Bytes a second of all rows, the median of rounds, as a ratio to the free ones, or to one by one, of the same run.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from statistics import median
from unittest import mock

from benchmarks.models import BOS, Variant, build, read_weights
from benchmarks.report import Row, finish, options_parser, print_table
from hnet_runtime.engine import structure
from hnet_runtime.engine.building import default_threads
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Constraint, SamplingParams
from hnet_runtime.engine.request import LiveRequest

PROMPT = BOS + b"Once upon a time there was a library that "
LENGTH = 192  # bytes of a completion
ROUNDS = 5
TABLE = Constraint(kind="regex", source=r"(?s).*")
GRAMMAR = Constraint(kind="json", source='{"type": "string", "minLength": 1000}')
FORM = Constraint(kind="regex", source="(The number that was drawn is [0-9]{2}, and its colour [a-z]{6}[.] ){9}")
# name, what it is held to, whether masks are made in a thread, whether bytes are taken ahead, the base of its ratio
CASES = (
    ("free", None, False, True, "free"),
    ("table", TABLE, False, True, "free"),
    ("grammar", GRAMMAR, False, True, "free"),
    ("grammar in a thread", GRAMMAR, True, True, "free"),
    ("form one by one", FORM, False, False, "form one by one"),
    ("form ahead", FORM, False, True, "form one by one"),
)


def rate(engine: Engine, rows: int, constraint: Constraint | None, in_thread: bool, ahead: bool) -> float:
    """Bytes of completions a second."""
    params = [
        SamplingParams(max_tokens=LENGTH, seed=1, choice=choice, ignore_eos=True, constraint=constraint)
        for choice in range(rows)
    ]
    dear = mock.patch.object(structure, "DEAR_SECONDS", -1.0 if in_thread else structure.DEAR_SECONDS)
    forces = nullcontext() if ahead else mock.patch.object(LiveRequest, "_force", return_value=False)
    with dear, forces:
        began = time.perf_counter()
        completions = engine.generate([PROMPT] * rows, params)
        seconds = time.perf_counter() - began
    for completion in completions:
        if completion.error is not None:
            raise RuntimeError(completion.error)
    return sum(completion.usage.completion_bytes for completion in completions) / seconds


def measure(engine: Engine, rows: int) -> dict[str, float]:
    """The rate of each case, in turn, the first round left out."""
    rates: dict[str, list[float]] = {name: [] for name, *_ in CASES}
    for _ in range(ROUNDS + 1):
        for name, constraint, in_thread, ahead, _ in CASES:
            rates[name].append(rate(engine, rows, constraint, in_thread, ahead))
    return {name: median(each[1:]) for name, each in rates.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--rows", default="1,16", help="that decode at once (default 1,16)")
    options: argparse.Namespace = parser.parse_args(arguments)
    counts = [int(count) for count in options.rows.split(",")]
    report: list[Row] = []
    for model in options.model or ["demo"]:
        config, weights = read_weights(model, options.dtype)
        threads = default_threads(config)
        variant = Variant(options.dtype, options.kernels, options.quantization, threads, options.bytes_per_chunk)
        settings = EngineConfig(max_num_seqs=max(counts), max_model_len=512, threads=threads)
        engine = Engine(build(config, weights, variant), model, settings)
        for rows in counts:
            rates = measure(engine, rows)
            lines = []
            for name, *_, base in CASES:
                ratio = rates[name] / rates[base]
                label = f"{model} rows={rows} {name}"
                report.append(Row(label, rates[name], "bytes/s", f"{model} rows={rows} {base}", ratio))
                lines.append([name, f"{rates[name]:.0f}", f"{ratio:.2f}"])
            print_table(f"{model}, {engine.info.kernels}, {rows} row(s)", ["held to", "bytes/s", "ratio"], lines)
    finish("structured", report, options.json)


if __name__ == "__main__":
    main()
