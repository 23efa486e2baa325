"""The paper's claim in miniature: `python -m training.miniature --data DATA --output RUNS`.

Knows four configurations of like compute for a byte (training/configs/miniature) and runs them on one text, each with
several seeds, one after another; a run that was interrupted goes on. What comes out is a table, whatever it says.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from hnet_runtime.config import VOCAB_SIZE
from training import checkpoint
from training.compute import multiplications_per_byte
from training.evaluate import markdown_table
from training.forward import TrainableHNet
from training.liveness import Liveness, bits_per_byte, measure
from training.perturb import KINDS, perturbed
from training.run import train
from training.settings import TrainingSettings, load
from training.tokens import texts_of_tokens, tokenizer_file
from training.windows import Text, Windows

CONFIGS = Path(__file__).with_name("configs") / "miniature"
NAMES = ("one-stage", "two-stage", "bytes", "tokens")


@dataclass(frozen=True)
class Outcome:
    """Of one run. bits: bits per byte on held-out text as it is (`as-it-is`) and of each kind of change."""

    seen: int
    parameters: int
    multiplications: float
    bits: dict[str, float]
    liveness: Liveness


@click.command("miniature")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the runs.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--evaluation-bytes", type=click.IntRange(1), default=131_072, show_default=True)
@click.option("--total", type=click.IntRange(1), help="Bytes that each run sees, in place of its configuration's.")
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Markdown; without it, standard output."
)
def miniature(
    data: Path, output: Path, seeds: int, total: int | None, evaluation_bytes: int, report: Path | None
) -> int:
    """Train and compare a 1-stage, a 2-stage, a byte-level and a token-level model on DATA/train.bin,
    DATA/heldout.bin."""
    outcomes: dict[str, list[Outcome]] = {}
    for seed in range(1, seeds + 1):
        for name in NAMES:
            folder = output / f"{name}-{seed}"
            settings_file = _settings(name, seed, data, total, folder)
            click.echo(f"── {name}, seed {seed} ──")
            if not train(settings_file, folder):
                return 1
            outcomes.setdefault(name, []).append(_outcome(settings_file, folder, evaluation_bytes))
    text = _report(outcomes)
    if report is None:
        click.echo(text)
    else:
        report.write_text(text, encoding="utf-8")
    return 0


def _settings(name: str, seed: int, data: Path, total: int | None, folder: Path) -> Path:
    """The configuration with this run's seed, data and length, in the run's own folder."""
    lines = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    changes = {
        "seed": str(seed),
        "train": f'"{(data / "train.bin").resolve()}"',
        "heldout": f'"{(data / "heldout.bin").resolve()}"',
    }
    if total is not None:
        changes |= {"total": str(total), "warmup": str(total // 10), "decay": str(total * 3 // 10)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.toml"
    path.write_text("\n".join(_changed(line, changes) for line in lines) + "\n", encoding="utf-8")
    return path


def _changed(line: str, changes: dict[str, str]) -> str:
    key = line.partition(" = ")[0]
    return f"{key} = {changes[key]}" if key in changes else line


def _outcome(settings_file: Path, folder: Path, evaluation_bytes: int) -> Outcome:
    settings, config = load(settings_file)
    state = checkpoint.newest(folder / "states")
    assert state is not None
    model = TrainableHNet(config, state.parameters)
    heldout = settings.data.heldout.read_bytes()
    bits: dict[str, float] = {}
    lengths = None
    for kind in ("as-it-is", *sorted(KINDS)):
        data = heldout if kind == "as-it-is" else perturbed(heldout, kind)
        text = _text(settings, folder, kind, data)
        lengths = None if settings.vocabulary is None else torch.from_numpy(text.lengths)
        mean_bytes = float(text.lengths[np.asarray(text.symbols)].mean())
        count = max(2, int(evaluation_bytes / (settings.data.window * mean_bytes)))
        windows, targets = Windows(text, settings.data.window, 0).evenly(count)
        if kind == "as-it-is":
            liveness, bytes_per_symbol = measure(model, windows, targets, lengths=lengths), mean_bytes
            bits[kind] = liveness.bits_per_byte
        else:
            bits[kind] = bits_per_byte(model, windows, targets, lengths=lengths)
    multiplications = multiplications_per_byte(
        config,
        [stage.positions_per_chunk for stage in liveness.stages],
        settings.data.window,
        vocabulary=settings.vocabulary or VOCAB_SIZE,
        bytes_per_symbol=bytes_per_symbol,
    )
    parameters = sum(tensor.numel() for tensor in state.parameters.values())
    return Outcome(state.counters.seen, parameters, multiplications, bits, liveness)


def _text(settings: TrainingSettings, folder: Path, kind: str, data: bytes) -> Text:
    path = folder / "heldout" / f"{kind}.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    if settings.vocabulary is None:
        return Text.of_bytes(path)
    kept = path.parent / kind
    kept.mkdir(exist_ok=True)
    learned = tokenizer_file(folder / "tokens", settings.vocabulary)
    tokenizer_file(kept, settings.vocabulary).write_bytes(learned.read_bytes())
    return texts_of_tokens(path, path, settings.vocabulary, kept)[1]  # nothing is learned again


def _report(outcomes: dict[str, list[Outcome]]) -> str:
    compared = [
        (
            name,
            f"{each[0].parameters / 1e6:.1f}",
            f"{statistics.mean(one.multiplications for one in each) / 1e6:.2f}",
            f"{each[0].seen / 1e6:.1f}",
            _of_seeds([one.bits["as-it-is"] for one in each]),
            *(_of_seeds([one.bits[kind] - one.bits["as-it-is"] for one in each]) for kind in sorted(KINDS)),
        )
        for name, each in outcomes.items()
    ]
    alive = [
        (name, str(index), *_live(each, index))
        for name, each in outcomes.items()
        for index in range(len(each[0].liveness.stages))
    ]
    kinds = [f"{kind} costs" for kind in sorted(KINDS)]
    header = ("model", "M parameters", "M multiplications a byte", "MB seen", "bits per byte", *kinds)
    live_header = (
        "model",
        "stage",
        "mean z costs",
        "another row's z",
        "z a chunk late",
        "bytes a chunk",
        "at white space",
    )
    return "\n".join(
        [
            "Seeds side by side. A change's cost is in bits per byte of the changed text.",
            "",
            *markdown_table(header, compared),
            "",
            *markdown_table(live_header, alive),
            "",
        ]
    )


def _live(outcomes: Sequence[Outcome], index: int) -> tuple[Any, ...]:
    stages = [(one.liveness.stages[index], one.liveness.bits_per_byte) for one in outcomes]
    return (
        *(_of_seeds([stage.bits[wrong] - exact for stage, exact in stages]) for wrong in ("mean", "other", "stale")),
        _of_seeds([stage.bytes_per_chunk for stage, _ in stages], digits=2),
        " / ".join(f"{stage.at_space:.0%}" for stage, _ in stages),
    )


def _of_seeds(values: Sequence[float], digits: int = 3) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    sys.exit(miniature(standalone_mode=True))
