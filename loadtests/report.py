"""What a run found, as one JSON document and one page of HTML that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from loadtests.plots import PLOTS, memory, svg
from loadtests.scenario import Scenario
from loadtests.solo import Compared
from loadtests.summary import Figures, knee, meets

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem } .about { color: #5a6675; margin-top: .2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e7ec; text-align: right }
th:first-child, td:first-child { text-align: left } .wrong { color: #c8322d; font-weight: 600 }
.doubt { color: #9a5b00 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Run:
    """A scenario at its levels, in rising order of load. compared: with the same requests alone, None if not done."""

    scenario: Scenario
    target: str
    machine: dict[str, Any]
    commit: str
    levels: Sequence[Figures]
    compared: Compared | None

    @property
    def capacity(self) -> Figures | None:
        """The highest level that met the objective, as all below it did."""
        found = None
        for level in self.levels:
            if not meets(level, self.scenario.objective):
                break
            found = level
        return found

    def in_words(self) -> list[str]:
        """Knee, capacity and comparison, a line each."""
        objective = self.scenario.objective
        promise = f"first byte within {objective.first_byte:g} s, no silence above {objective.gap:g} s"
        lines = [
            f"Knee: {_rate(knee(self.levels), 'no level was kept up with')}.",
            f"Capacity ({promise}, for {100 * objective.share:g} % of requests): "
            f"{_rate(self.capacity, 'no level met it')}.",
        ]
        return lines if self.compared is None else [*lines, self.compared.in_words()]

    def faults(self) -> list[str]:
        """What is wrong with the server or with the counts, in words."""
        found = []
        for level in self.levels:
            where = f"at {level.rate:g} requests/s"
            found += [f"{where}: {check.name} do not add up" for check in level.checks if not check.holds]
            for outcome in ("broken", "failed"):
                if level.outcomes[outcome]:
                    found.append(f"{where}: {level.outcomes[outcome]} streams {outcome}")
            if level.without_retry_after:
                found.append(f"{where}: {level.without_retry_after} rejections without Retry-After")
        if self.compared is not None and self.compared.garbled:
            found.append(f"{self.compared.garbled} streams have other bytes than the same request alone")
        return found

    def doubts(self) -> list[str]:
        """Where figures are of the client, or of a machine too busy for both, rather than of the server."""
        return [
            f"at {level.rate:g} requests/s: the client was late ({1e3 * level.lateness.p99:.0f} ms, 0.99 quantile) or "
            f"left requests unsent ({level.unsent}): the server may do better than this"
            for level in self.levels
            if not level.is_client_fit
        ]

    def to_json(self) -> dict[str, Any]:
        def rate(level: Figures | None) -> float | None:
            return None if level is None else level.rate

        return {
            "scenario": self.scenario.model_dump(),
            "target": self.target,
            "commit": self.commit,
            "machine": self.machine,
            "knee": rate(knee(self.levels)),
            "capacity": rate(self.capacity),
            "levels": [level.to_json() for level in self.levels],
            "compared": None if self.compared is None else self.compared.to_json(),
            "faults": self.faults(),
            "doubts": self.doubts(),
        }


def write(run: Run, folder: Path) -> tuple[Path, Path]:
    """The report's HTML and JSON in `folder`."""
    page, document = folder / "report.html", folder / "report.json"
    page.write_text(html(run), encoding="utf-8")
    document.write_text(json.dumps(_finite(run.to_json()), indent=1) + "\n", encoding="utf-8")
    return page, document


def html(run: Run) -> str:
    objective = run.scenario.objective
    plots = "".join(
        f"<figure><figcaption>{name}</figcaption>{svg(plot(run.levels, objective))}</figure>"
        for name, plot in PLOTS.items()
        if plot is not memory or any(level.memory for level in run.levels)
    )
    verdict = "".join(f'<li class="wrong">{escape(fault)}</li>' for fault in run.faults())
    verdict = verdict or "<li>No stream is lost, and every count adds up.</li>"
    verdict += "".join(f'<li class="doubt">{escape(doubt)}</li>' for doubt in run.doubts())
    body = f"""
<h1>{escape(run.scenario.name)}</h1><p class="about">{escape(run.scenario.description)}</p>
<p>{escape(run.target)} · {escape(str(run.machine["processor"]))}, {run.machine["cores"]} cores ·
commit {escape(run.commit)} · {"one level" if len(run.levels) == 1 else f"{len(run.levels)} levels"}
of {run.scenario.seconds:g} s, the first {run.scenario.warm_up:g} s of each not counted</p>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in run.in_words())}{verdict}</ul>
<div class="plots">{plots}</div>
<h2>What clients saw</h2>{_table(CLIENT_COLUMNS, [_client(level) for level in run.levels])}
<h2>What became of requests</h2>{_table(["requests/s", *run.levels[0].outcomes], [_outcomes(at) for at in run.levels])}
{"".join(_server(level) for level in run.levels if level.checks)}
"""
    head = f'<meta charset="utf-8"><title>{escape(run.scenario.name)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


CLIENT_COLUMNS = [
    *("requests/s", "offered", "served", "bytes/s", "goodput", "in objective", "attained"),
    *("first byte p50", "p99", "gap p50", "p99", "bytes/s of a stream", "client late p99"),
]


def _client(level: Figures) -> list[str]:
    rates = [level.offered, level.served, level.throughput, level.goodput, level.good]
    seconds = [level.first_byte.p50, level.first_byte.p99, level.gap.p50, level.gap.p99]
    return [
        f"{level.rate:g}",
        *(_number(rate) for rate in rates),
        f"{100 * level.attained:.1f} %",
        *(_milliseconds(each) for each in seconds),
        _number(level.stream_rate.p50),
        _milliseconds(level.lateness.p99),
    ]


def _outcomes(level: Figures) -> list[str]:
    return [f"{level.rate:g}", *map(str, level.outcomes.values())]


def _server(level: Figures) -> str:
    """Both sides of one level."""
    checks = [
        [check.name, _between(check.least, check.most), f"{check.server:.0f}", "yes" if check.holds else "no"]
        for check in level.checks
    ]
    told = [[name, "" if value is None else _number(value)] for name, value in level.server.items()]
    if level.growth is not None:
        told.append(["memory at the end ÷ after a quarter of the level", _number(level.growth)])
    told.insert(0, ["first byte as clients saw it (mean s, without warm-up)", _number(level.first_byte.mean)])
    counts = _table(["count, warm-up included", "client", "server", "adds up"], checks)
    return f"<h2>Client and server at {level.rate:g} requests/s</h2>{counts}<br>{_table(['told', ''], told)}"


def _between(least: float, most: float) -> str:
    if least == most:
        return f"{least:.0f}"
    return f"{least:.0f} or more" if math.isinf(most) else f"{least:.0f} to {most:.0f}"


def _rate(level: Figures | None, otherwise: str) -> str:
    return otherwise if level is None else f"{level.rate:g} requests/s, {level.goodput:.0f} bytes/s"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _milliseconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
