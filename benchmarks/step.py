"""The step of one row beside plain torch: eager (plain_step.py) and the same under torch.compile.

All read the same bytes with the same boundaries, in turns of a few dozen bytes, so that what else the machine does
falls on all of them. The compiled one takes the faster setting found for it (inductor's C++ wrapper).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.models import Rows, Variant, build, read_weights, text
from benchmarks.plain_step import PlainStep
from benchmarks.report import Row, print_table

TURN = 32


def compare_steps(model: str, variant: Variant, length: int, compiled: bool = True) -> list[Row]:
    """Milliseconds of a byte, without sampling, and ratios to eager and compiled torch."""
    config, weights = read_weights(model, variant.dtype)
    torch.set_num_threads(variant.threads)
    data = text(length)
    rows = Rows(build(config, weights, variant), 1, length)
    sides: dict[str, Callable[[int], object]] = {
        "native": lambda at: rows.run([data[at : at + 1]]),
        "eager torch": _plain(PlainStep(config, weights, length), data),
    }
    if compiled:
        step = PlainStep(config, weights, length, lambda part: torch.compile(part, dynamic=False, options=_COMPILE))
        sides["torch.compile"] = _plain(step, data)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for begin in range(0, length, TURN):
        for name, side in sides.items():
            started = time.perf_counter()
            for at in range(begin, min(begin + TURN, length)):
                side(at)
            seconds[name].append((time.perf_counter() - started) / TURN)
    cost = {name: 1e3 * median(each[len(each) // 4 :]) for name, each in seconds.items()}  # the first turns compile
    report = [
        Row(f"{model} step {name}", ms, "ms", f"{model} step native", ms / cost["native"]) for name, ms in cost.items()
    ]
    print_table(
        f"{model}: milliseconds of a byte of one row, {variant.threads} thread(s), without sampling",
        ["", "ms", "÷ native"],
        [[name, f"{ms:.3f}", f"{ms / cost['native']:.2f}×"] for name, ms in cost.items()],
    )
    return report


_COMPILE = {"cpp_wrapper": True}


def _plain(step: PlainStep, data: bytes) -> Callable[[int], object]:
    return lambda at: step.step(data[at])
