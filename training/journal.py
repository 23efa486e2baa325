"""What a run says as it goes: a line for a person, and `journal.jsonl` for plots.

Knows figures by name; no tensors. A run that goes on from a state first drops the lines that came after it, so the
journal is one curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.checkpoint import Counters
from training.liveness import Liveness


class Journal:
    """end: bytes seen at which the run ends, for the time that is left; every: bytes between two lines of steps, whose
    figures are means."""

    def __init__(self, folder: Path, counters: Counters, end: int, every: int, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._end, self._every, self._say = folder / "journal.jsonl", end, every, say
        _drop_after(self._path, counters.step)
        self._began, self._from = time.monotonic(), counters.seen
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._said = counters.seen

    def step(self, counters: Counters, figures: dict[str, Any]) -> None:
        """figures: numbers, lists of numbers, and mappings of numbers."""
        self._steps += 1
        for name, value in _flat(figures):
            self._sums[name] = self._sums.get(name, 0.0) + value
        if counters.seen - self._said < self._every and counters.seen < self._end:
            return
        means = {name: value / self._steps for name, value in self._sums.items()}
        rate = (counters.seen - self._from) / max(time.monotonic() - self._began, 1e-9)
        self._write({"kind": "step", "step": counters.step, "seen": counters.seen, "bytes_per_second": rate, **means})
        chunks = " ".join(f"{means[name]:.2f}" for name in sorted(means) if name.startswith("positions_per_chunk"))
        self._say(
            f"{counters.seen / 1e6:8.2f} MB  {means['bits_per_byte']:.3f} bits/byte  {chunks} per chunk"
            f"  {rate / 1e3:.1f} kB/s  {_span((self._end - counters.seen) / rate)} left"
        )
        self._sums, self._steps, self._said = {}, 0, counters.seen

    def evaluation(self, counters: Counters, liveness: Liveness) -> None:
        self._write({"kind": "evaluation", "step": counters.step, "seen": counters.seen, **asdict(liveness)})
        costs = "; ".join(
            f"stage {index}: "
            + ", ".join(f"{name} z +{bits - liveness.bits_per_byte:.3f}" for name, bits in stage.bits.items())
            + f", {stage.bytes_per_chunk:.2f} bytes a chunk, {stage.at_space:.0%} at white space"
            for index, stage in enumerate(liveness.stages)
        )
        self._say(f"{counters.seen / 1e6:8.2f} MB  held out {liveness.bits_per_byte:.3f} bits/byte  {costs}")

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The journal of a run's folder; a last line that a kill cut short is left out."""
    path = folder / "journal.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read(path.parent) if record["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _flat(figures: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            flat += [(f"{name}.{key}", float(each)) for key, each in value.items()]
        elif isinstance(value, list):
            flat += [(f"{name}.{index}", float(each)) for index, each in enumerate(value)]
        else:
            flat.append((name, float(value)))
    return flat


def _span(seconds: float) -> str:
    minutes = int(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m"
