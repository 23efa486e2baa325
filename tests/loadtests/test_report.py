"""The report of a run: what it says of known records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtests import scenario as scenarios
from loadtests.level import Level
from loadtests.plots import PLOTS, svg
from loadtests.report import Run, write
from loadtests.scrape import Scrape
from loadtests.solo import Compared, is_same
from loadtests.stream import Record
from loadtests.summary import Figures, figures

SCENARIO = scenarios.load("chat")
Make = Callable[..., Record]


@pytest.fixture
def levels(record: Make, level: Callable[..., Level], counted: Callable[..., Scrape]) -> list[Figures]:
    """Two levels that keep the objective, and one that is late and turns two away."""

    def at(rate: float, *records: Record, rejected: int = 0) -> Figures:
        served = len(records) - rejected
        server = counted(served, 4 * served, 10 * served, rejected=rejected)
        watched = replace(
            level(*records, rate=rate, counted=server), memory=tuple((float(n), n << 20) for n in range(60))
        )
        return figures(watched, SCENARIO.objective)

    slow = [record(3.0, first=0.7)] * 3 + [record(9.0, first=3.0)] * 3
    away = [record(5.0, "", outcome="rejected", status=429, retry_after="1")] * 2
    return [at(1.0, record(3.0)), at(2.0, record(3.0), record(4.0)), at(4.0, *slow, *away, rejected=2)]


def run_of(levels: Sequence[Figures], compared: Compared | None = None) -> Run:
    return Run(SCENARIO, "hnet serve demo", {"processor": "a <chip>", "cores": 2}, "abc", levels, compared)


def test_a_run_says_knee_and_capacity_and_no_fault(levels: list[Figures], tmp_path: Path) -> None:
    page, document = write(run_of(levels, Compared(3, 9, 0, 0)), tmp_path)
    found = json.loads(document.read_text(encoding="utf-8"))
    assert (found["knee"], found["capacity"]) == (2.0, 2.0)
    assert found["faults"] == []
    assert [level["outcomes"]["rejected"] for level in found["levels"]] == [0, 0, 2]
    shown = page.read_text(encoding="utf-8")
    assert "every count adds up" in shown
    assert "9 streams compared" in shown
    assert "a &lt;chip&gt;" in shown
    assert "<script" not in shown
    assert shown.count("<svg") == len(PLOTS)


def test_what_is_wrong_is_said(
    record: Make, level: Callable[..., Level], counted: Callable[..., Scrape], tmp_path: Path
) -> None:
    records = (
        record(3.0),
        record(3.0, outcome="broken"),
        record(3.0, "", outcome="rejected", status=429),
        record(3.0, sent=4.0),
    )
    run = run_of([figures(level(*records, counted=counted(9, 16, 30)), SCENARIO.objective)], Compared(2, 2, 1, 0))
    said = "\n".join(run.faults())
    for words in (
        "requests accepted do not add up",
        "1 streams broken",
        "without Retry-After",
        "1 streams have",
    ):
        assert words in said
    (doubt,) = run.doubts()
    assert "1000 ms" in doubt
    page, _ = write(run, tmp_path)
    assert page.read_text(encoding="utf-8").count('class="wrong"') == len(run.faults())


def test_a_level_in_which_nothing_came_is_reported(level: Callable[..., Level], tmp_path: Path) -> None:
    _, document = write(run_of([figures(level(), SCENARIO.objective)]), tmp_path)
    (found,) = json.loads(document.read_text(encoding="utf-8"))["levels"]
    assert found["attained"] is None
    assert found["offered"] == 0


def test_memory_is_shown_where_it_is_known(levels: list[Figures], tmp_path: Path) -> None:
    page, _ = write(run_of(levels), tmp_path)
    assert "memory at the end ÷" in page.read_text(encoding="utf-8")
    page, _ = write(run_of([replace(levels[0], memory=())]), tmp_path)
    shown = page.read_text(encoding="utf-8")
    assert shown.count("<svg") == len(PLOTS) - 1
    assert "memory at the end ÷" not in shown


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_an_image_that_can_be_read(name: str, levels: list[Figures]) -> None:
    figure = PLOTS[name](levels, SCENARIO.objective)
    image = ElementTree.fromstring(svg(figure))
    assert image.tag.endswith("svg")
    axis = "seconds of a level" if name == "Memory" else "requests a second offered"
    assert axis in "".join(image.itertext())


def test_a_stream_is_compared_with_itself_alone(record: Make) -> None:
    alone = record(text="abcd")
    assert is_same(record(text="abcd"), alone)
    assert not is_same(record(text="abce"), alone)
    assert not is_same(record(text="abc"), alone)
    assert is_same(record(text="abc", outcome="aborted"), alone)
    assert not is_same(record(text="abd", outcome="aborted"), alone)
