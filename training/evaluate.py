"""How well a model predicts a text, and whether its inner networks are alive: `python -m training.evaluate MODEL DATA`.

Knows checkpoints and files of documents; what is measured is `training.liveness`'s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch

from hnet_runtime.checkpoint import CheckpointError, load_weights, locate
from hnet_runtime.config import ConfigError
from training.forward import TrainableHNet
from training.liveness import Liveness, measure
from training.windows import Text, Windows


@click.command("evaluate")
@click.argument("model")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="Official JSON, where MODEL is a file.")
@click.option("--window", type=click.IntRange(16), default=1024, show_default=True, help="Bytes of a window.")
@click.option("--windows", type=click.IntRange(2), default=128, show_default=True, help="How many, spread over DATA.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Writes the figures there, too.")
def evaluate(model: str, data: Path, *, config: Path | None, window: int, windows: int, json_file: Path | None) -> None:
    """Bits per byte and liveness of MODEL on DATA, documents as `python -m training.corpora build` writes them.

    Every window begins with BOS and nothing before it, so each byte is predicted from at most a window's bytes. In
    fp32, on one thread, whatever dtype the model is stored in.
    """
    torch.set_num_threads(1)
    try:
        source = locate(model, config)
        weights = load_weights(source, dtype=torch.float32)
        texts, targets = Windows(Text.of_bytes(data), window, 0).evenly(windows)
    except (CheckpointError, ConfigError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    liveness = measure(TrainableHNet(source.config, weights), texts, targets)
    click.echo(table(liveness))
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(liveness), indent=2) + "\n", encoding="utf-8")


def table(liveness: Liveness) -> str:
    """The figures as Markdown."""
    lines = [f"Bits per byte: **{liveness.bits_per_byte:.3f}**", ""]
    if liveness.stages:
        lines += markdown_table(
            (
                *("stage", "z's mean costs", "another row's z", "z a chunk late"),
                *("bytes a chunk", "positions a chunk"),
                *("at white space", "at punctuation", "entropy of lengths, bits"),
            ),
            [
                (
                    str(index),
                    *(f"{stage.bits[wrong] - liveness.bits_per_byte:.3f}" for wrong in ("mean", "other", "stale")),
                    f"{stage.bytes_per_chunk:.2f}",
                    f"{stage.positions_per_chunk:.2f}",
                    f"{stage.at_space:.0%}",
                    f"{stage.at_punctuation:.0%}",
                    f"{stage.length_entropy:.2f}",
                )
                for index, stage in enumerate(liveness.stages)
            ],
        )
        lines.append("")
    lines += markdown_table(
        ("layer of the main network", "rms of its residual stream", "share of it that is constant"),
        [(str(index), f"{each.rms:.2f}", f"{each.constant_share:.0%}") for index, each in enumerate(liveness.main)],
    )
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_row(header), _row(["---"] * len(header)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(evaluate())
