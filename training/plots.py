"""A run's curves as one picture, from its journal. Knows figures by name; matplotlib, which the extra `train`
brings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.journal import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(folder: Path) -> Path:
    """Writes `curves.png` into a run's folder; returns it. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read(folder)
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten().tolist()
    _losses(panels[0], steps, evaluations)
    _costs(panels[1], evaluations)
    _chunks(panels[2], steps)
    _places(panels[3], evaluations)
    _norms(panels[4], steps)
    _residuals(panels[5], evaluations)
    for panel in panels:
        panel.set_xlabel("MB seen")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.suptitle(folder.name)
    FigureCanvasAgg(figure)
    target = folder / "curves.png"
    figure.savefig(target, dpi=110)
    return target


def _seen(records: Sequence[dict[str, Any]]) -> list[float]:
    return [record["seen"] / 1e6 for record in records]


def _losses(panel: Axes, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> None:
    panel.plot(_seen(steps), [record["bits_per_byte"] for record in steps], label="training", linewidth=0.8)
    panel.plot(_seen(evaluations), [record["bits_per_byte"] for record in evaluations], "o-", label="held out")
    if evaluations:
        lowest = min(record["bits_per_byte"] for record in evaluations)
        panel.set_ylim(lowest - 0.2, lowest + 1.4)
    panel.set_title("bits per byte")


def _costs(panel: Axes, evaluations: Sequence[dict[str, Any]]) -> None:
    for stage in range(len(evaluations[0]["stages"]) if evaluations else 0):
        for wrong in evaluations[0]["stages"][stage]["bits"]:
            costs = [record["stages"][stage]["bits"][wrong] - record["bits_per_byte"] for record in evaluations]
            panel.plot(_seen(evaluations), costs, "o-", label=f"stage {stage}, z: {wrong}", markersize=3)
    panel.set_title("what a wrong z costs, bits per byte")


def _chunks(panel: Axes, steps: Sequence[dict[str, Any]]) -> None:
    for name in sorted({name for record in steps for name in record if name.startswith("positions_per_chunk")}):
        panel.plot(_seen(steps), [record.get(name, math.nan) for record in steps], label=_label(name))
    panel.set_ylim(0, 12)
    panel.set_title("positions a chunk")


def _label(name: str) -> str:
    return f"stage {name.rpartition('.')[2]}"


def _places(panel: Axes, evaluations: Sequence[dict[str, Any]]) -> None:
    for stage in range(len(evaluations[0]["stages"]) if evaluations else 0):
        for name, label in (("at_space", "white space"), ("at_punctuation", "punctuation")):
            shares = [record["stages"][stage][name] for record in evaluations]
            panel.plot(_seen(evaluations), shares, "o-", label=f"stage {stage}, {label}", markersize=3)
    panel.set_ylim(0, 1)
    panel.set_title("share of chunks that open at")


def _norms(panel: Axes, steps: Sequence[dict[str, Any]]) -> None:
    for name in sorted({name for record in steps for name in record if name.startswith("gradient_norms.")}):
        label = name.removeprefix("gradient_norms.")
        panel.plot(_seen(steps), [record.get(name, math.nan) for record in steps], label=label, linewidth=0.8)
    panel.set_yscale("log")
    panel.set_title("gradient norms")


def _residuals(panel: Axes, evaluations: Sequence[dict[str, Any]]) -> None:
    for layer in range(len(evaluations[0]["main"]) if evaluations else 0):
        rms = [record["main"][layer]["rms"] for record in evaluations]
        constant = evaluations[-1]["main"][layer]["constant_share"]
        panel.plot(_seen(evaluations), rms, label=f"layer {layer}, {constant:.0%} constant", linewidth=1)
    panel.set_yscale("log")
    panel.set_title("rms of the main network's residual stream")
