"""A level's figures from records whose truth is plain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from loadtests.level import Level
from loadtests.memory import watched
from loadtests.scenario import Objective
from loadtests.scrape import Scrape
from loadtests.stream import Record
from loadtests.summary import Quantiles, compare, figures, keeps, knee, meets

OBJECTIVE = Objective(first_byte=0.5, gap=0.2, share=0.75)
Make = Callable[..., Record]


def test_quantiles_are_values_that_came() -> None:
    found = Quantiles.of([float(value) for value in range(100, 0, -1)])
    assert (found.count, found.p50, found.p90, found.p99, found.most) == (100, 50, 90, 99, 100)
    assert found.mean == 50.5
    assert Quantiles.of([3.0]).p99 == 3.0
    assert Quantiles.of([]).count == 0


def test_what_is_due_in_the_warm_up_is_not_counted(record: Make, level: Callable[..., Level]) -> None:
    found = figures(level(record(1.0, first=0.4), *(record(due) for due in (2.0, 4.0, 6.0, 9.0))), OBJECTIVE)
    assert found.offered == 4 / 8
    assert found.first_byte.count == 4
    assert found.first_byte.most == pytest.approx(0.1)
    assert found.outcomes["complete"] == 5


def test_bytes_count_when_they_come(record: Make, level: Callable[..., Level]) -> None:
    across = record(1.85, "abcd")  # at 1.95, 2.05, 2.15, 2.25
    late = record(9.75, "abcd")  # at 9.85, 9.95, 10.05, 10.15
    found = figures(level(across, late), OBJECTIVE)
    assert found.throughput == (3 + 2) / 8
    assert found.served == 1 / 8


def test_goodput_is_of_streams_that_were_served(record: Make, level: Callable[..., Level]) -> None:
    records = (
        record(3.0, "abcd"),
        record(3.0, "ab", outcome="aborted"),
        record(3.0, "a", outcome="broken"),
        record(3.0, "abcdefgh", first=0.6),
        record(3.0, "", outcome="rejected", status=429, retry_after="2"),
    )
    found = figures(level(*records), OBJECTIVE)
    assert found.throughput == 15 / 8
    assert found.goodput == 14 / 8
    assert found.good == 6 / 8
    assert found.attained == 2 / 5
    assert not meets(found, OBJECTIVE)
    assert found.without_retry_after == 0


def test_one_long_silence_breaks_the_promise(record: Make) -> None:
    assert keeps(record(gap=0.15), OBJECTIVE)
    assert not keeps(record(gap=0.25), OBJECTIVE)
    assert not keeps(record(first=0.55), OBJECTIVE)
    assert not keeps(record(outcome="unfinished"), OBJECTIVE)


def test_a_late_client_is_not_fit(record: Make, level: Callable[..., Level]) -> None:
    assert figures(level(record(3.0)), OBJECTIVE).is_client_fit
    assert not figures(level(record(3.0, sent=3.5)), OBJECTIVE).is_client_fit
    assert not figures(level(record(3.0), Record("short", 1, 4.0)), OBJECTIVE).is_client_fit


def test_counts_of_both_sides_add_up(record: Make, counted: Callable[..., Scrape]) -> None:
    records = [record(text="abcd"), record(text="ab")]
    assert all(check.holds for check in compare(records, counted(2, 6, 20)))


@pytest.mark.parametrize(
    ("server", "wrong"),
    [
        ((3, 6, 20), {"requests accepted", "requests that came to their end"}),
        ((2, 5, 20), {"bytes generated"}),
        ((2, 7, 20), {"bytes generated"}),
        ((2, 6, 19), {"bytes of prompts"}),
    ],
)
def test_a_count_that_differs_is_seen(
    record: Make, counted: Callable[..., Scrape], server: tuple[int, int, int], wrong: set[str]
) -> None:
    checks = compare([record(text="abcd"), record(text="ab")], counted(*server))
    assert {check.name for check in checks if not check.holds} == wrong


def test_a_stream_that_is_cut_may_have_been_over(record: Make, counted: Callable[..., Scrape]) -> None:
    records = [record(text="abcd"), record(text="ab", outcome="aborted")]
    assert all(check.holds for check in compare(records, counted(2, 100, 20)))
    assert all(check.holds for check in compare(records, counted(1, 6, 20, aborted=1)))
    assert not all(check.holds for check in compare(records, counted(0, 6, 20, aborted=2)))
    assert not all(check.holds for check in compare(records, counted(1, 5, 20, aborted=1)))


def test_rejections_and_failures_are_compared(record: Make, counted: Callable[..., Scrape]) -> None:
    records = [record(), record(text="", outcome="rejected", status=429)]
    assert all(check.holds for check in compare(records, counted(1, 4, 10, rejected=1)))
    for server in (counted(1, 4, 10), counted(1, 4, 10, rejected=1, error=1)):
        assert not all(check.holds for check in compare(records, server))


def test_the_knee_is_the_last_level_that_kept_up(record: Make, level: Callable[..., Level]) -> None:
    keeping = [figures(level(*[record(3.0)] * count, rate=count), OBJECTIVE) for count in (1, 2)]
    lagging = figures(level(*[record(3.0)] * 3, *[record(3.0, end=11.0)] * 1, rate=4), OBJECTIVE)
    assert knee([*keeping, lagging]) is keeping[1]
    assert knee([*keeping, lagging, keeping[0]]) is keeping[1]
    assert knee([lagging]) is None


def test_growth_is_of_the_end_over_the_first_quarter(record: Make, level: Callable[..., Level]) -> None:
    def grown(sizes: Sequence[int]) -> float | None:
        samples = tuple((float(at), size) for at, size in enumerate(sizes))
        return figures(replace(level(record(due=3.0)), memory=samples), OBJECTIVE).growth

    assert grown([5] * 20 + [100] * 30 + [150] * 30) == pytest.approx(1.5)
    assert grown([1000] + [100] * 79) == pytest.approx(1.0)
    assert grown([100] * 39) is None


def test_memory_is_asked_for_while_a_level_runs() -> None:
    sizes = iter(range(100, 200))
    with watched(lambda: next(sizes), 1.0) as samples:
        time.sleep(1.2)
    assert [size for _, size in samples] == [100]
    with watched(None, 1.0) as samples:
        pass
    assert samples == []
