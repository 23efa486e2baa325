"""The plots of a report, as SVG: figures of levels against the load offered."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.scenario import Objective
from loadtests.summary import Figures, knee

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea8a1a", "#15945a", "#c8322d", "#8b95a3"
SIZE = (6.2, 3.6)  # inches
OUTCOME_COLOURS = {
    "complete": GREEN,
    "aborted": BLUE,
    "rejected": ORANGE,
    "failed": RED,
    "broken": "#6d1111",
    "unfinished": "#a855c7",
    "unsent": GREY,
}


def throughput(levels: Sequence[Figures], objective: Objective) -> Figure:
    figure, axes, offered = _axes(levels, "bytes a second")
    axes.plot(offered, [level.throughput for level in levels], "o-", color=GREY, label="all bytes that came")
    axes.plot(offered, [level.goodput for level in levels], "o-", color=BLUE, label="of streams served (goodput)")
    axes.plot(offered, [level.good for level in levels], "o--", color=GREEN, label="of those within the objective")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def latency(levels: Sequence[Figures], objective: Objective) -> Figure:
    return _quantiles(levels, "seconds to the first byte", lambda level: level.first_byte, objective.first_byte)


def gaps(levels: Sequence[Figures], objective: Objective) -> Figure:
    return _quantiles(levels, "seconds between two events", lambda level: level.gap, objective.gap)


def attainment(levels: Sequence[Figures], objective: Objective) -> Figure:
    figure, axes, offered = _axes(levels, "% of requests offered")
    axes.plot(offered, [100 * level.attained for level in levels], "o-", color=GREEN, label="within the objective")
    axes.axhline(100 * objective.share, color=RED, linestyle=":", label=f"promised: {100 * objective.share:g} %")
    axes.set_ylim(0, 105)
    return _finished(figure, axes)


def outcomes(levels: Sequence[Figures], objective: Objective) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(levels)
    places = range(len(levels))
    for outcome, colour in OUTCOME_COLOURS.items():
        shares = [100 * level.outcomes[outcome] / max(1, sum(level.outcomes.values())) for level in levels]
        if any(shares):
            axes.bar(places, shares, bottom=bottom, color=colour, label=outcome, width=0.7)
            bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    axes.set_xticks(places, [f"{level.rate:g}" for level in levels])
    axes.set_xlabel("requests a second offered")
    axes.set_ylabel("% of requests, warm-up included")
    axes.set_ylim(0, 125)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    return _finished(figure, axes, columns=4)


def memory(levels: Sequence[Figures], objective: Objective) -> Figure:
    del objective
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for level in levels:
        seconds, sizes = zip(*level.memory, strict=True) if level.memory else ((), ())
        axes.plot(seconds, [size / 2**20 for size in sizes], label=f"{level.rate:g} requests/s")
    axes.set_xlabel("seconds of a level")
    axes.set_ylabel("MiB that the server has for itself")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


PLOTS: dict[str, Callable[[Sequence[Figures], Objective], Figure]] = {
    "Throughput": throughput,
    "Time to the first byte": latency,
    "Silence between events": gaps,
    "Objective": attainment,
    "What became of requests": outcomes,
    "Memory": memory,
}


def svg(figure: Figure) -> str:
    """To be put into HTML; text stays text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hnet"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _quantiles(levels: Sequence[Figures], what: str, of: Callable[[Figures], object], limit: float) -> Figure:
    figure, axes, offered = _axes(levels, what)
    for name, label, colour in (("p50", "median", GREEN), ("p90", "0.9", BLUE), ("p99", "0.99", ORANGE)):
        axes.plot(offered, [getattr(of(level), name) for level in levels], "o-", color=colour, label=label)
    axes.axhline(limit, color=RED, linestyle=":", label=f"promised: {limit:g} s")
    axes.set_yscale("log")
    return _finished(figure, axes)


def _axes(levels: Sequence[Figures], what: str) -> tuple[Figure, Axes, list[float]]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("requests a second offered")
    axes.set_ylabel(what)
    if (found := knee(levels)) is not None and found is not levels[-1]:
        axes.axvline(found.rate, color=GREY, linewidth=1, linestyle="--", label="knee")
    return figure, axes, [level.rate for level in levels]


def _finished(figure: Figure, axes: Axes, columns: int = 1) -> Figure:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, ncols=columns)
    return figure
