"""Prompts read a second: the native prefill against a chunked scan in torch, and how time grows with length.

    hnet bench prefill [--model demo] [--lengths 1024,8192] [--threads 1]

Both read the same bytes with the same boundaries, whole, from an empty row, and give the last position's logits. The
torch side runs its scan in chunks of 64, 128 and 256 positions, and its best counts. `in spans` feeds the native side
512 bytes at a time, which is how an idle engine reads a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.chunked_scan import ChunkedScan
from benchmarks.models import Rows, Variant, build, override, read_weights, text
from benchmarks.report import Row, finish, numbers, options_parser, print_table
from hnet_runtime.config import ModelConfig

SPAN = 512
SCAN_CHUNKS = (64, 128, 256)


def measure(model: str, variant: Variant, lengths: list[int], rounds: int) -> list[Row]:
    config, weights = read_weights(model, variant.dtype)
    torch.set_num_threads(variant.threads)
    rows = Rows(build(config, weights, variant), 1, max(lengths))
    kind = variant.quantization or str(weights["embeddings.weight"].dtype).removeprefix("torch.")
    name = f"{model} {kind} threads={variant.threads}"
    report, table = [], []
    seconds: dict[int, tuple[float, float, float, list[float]]] = {}
    for length in lengths:
        seconds[length] = _one_length(rows, config, weights, variant, text(length), rounds)
    shortest = lengths[0]
    for length, (whole, spans, scan, by_stage) in seconds.items():
        ratio = whole / length / (seconds[shortest][0] / shortest)
        bytewise = by_stage[0] / length / (seconds[shortest][3][0] / shortest)
        here = f"{name} length={length}"
        report += [
            Row(f"{here} chunked scan in torch", length / scan, "bytes/s"),
            Row(f"{here} native whole", length / whole, "bytes/s", f"{here} chunked scan in torch", scan / whole),
            Row(f"{here} native in spans", length / spans, "bytes/s", f"{here} chunked scan in torch", scan / spans),
            Row(
                f"{here} cost of a byte", 1e6 * whole / length, "µs", f"{name} length={shortest} cost of a byte", ratio
            ),
            Row(
                f"{here} cost of a byte in stage 0",
                1e6 * by_stage[0] / length,
                "µs",
                f"{name} length={shortest} cost of a byte in stage 0",
                bytewise,
            ),
        ]
        rates = [f"{length / each:.0f}" for each in (scan, whole)]
        table.append(
            [str(length), *rates, f"{scan / whole:.2f}×", f"{scan / spans:.2f}×", f"{bytewise:.2f}", f"{ratio:.2f}"]
        )
    columns = ["bytes", "torch", "native", "÷ torch", "in spans ÷", "stage 0 a byte", "all a byte"]
    chunking = f", {variant.bytes_per_chunk:g} bytes a chunk" if variant.bytes_per_chunk else ""
    print_table(f"{name}{chunking}: prompt bytes/s; cost of a byte ÷ that at {shortest}", columns, table)
    return report


def _one_length(
    rows: Rows, config: ModelConfig, weights: Mapping[str, Tensor], variant: Variant, prompt: bytes, rounds: int
) -> tuple[float, float, float, list[float]]:
    """Best seconds whole, in spans, and of torch; and seconds by stage of the best whole one. Taken in turn."""
    chunking = override(config, variant.bytes_per_chunk)
    scans = [ChunkedScan(config, weights, chunking, chunk) for chunk in SCAN_CHUNKS]
    whole = spans = scan = float("inf")
    by_stage: list[float] = []
    for turn in range(rounds):
        rows.restart()
        took, result = rows.run([prompt])
        if took < whole:
            whole, by_stage = took, [work.seconds for work in result.work]
        rows.restart()
        starts = range(0, len(prompt), SPAN)
        spans = min(spans, sum(rows.run([prompt[at : at + SPAN]], logits=int(at == starts[-1]))[0] for at in starts))
        for each in scans if turn == 0 else scans[:1]:
            started = time.perf_counter()
            each.prefill(prompt)
            took = time.perf_counter() - started
            if took < scan:
                scan = took
                scans.insert(0, scans.pop(scans.index(each)))
    return whole, spans, scan, by_stage


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--lengths", default="1024,8192")
    parser.add_argument("--threads", default="1", help="numbers of CPU threads, for both sides")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    report: list[Row] = []
    for model in options.model or ["demo", "random:hnet_1stage_L"]:
        chunking = options.bytes_per_chunk or (4.8 if model != "demo" else None)
        for threads in numbers(options.threads):
            variant = Variant(options.dtype, options.kernels, options.quantization, threads, chunking)
            report += measure(model, variant, numbers(options.lengths), options.rounds)
    finish("prefill", report, options.json)


if __name__ == "__main__":
    main()
