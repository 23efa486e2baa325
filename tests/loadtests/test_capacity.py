"""The search for the highest load at which a promise holds."""

from __future__ import annotations

import pytest

from loadtests.capacity import search


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.7, 40.0])
def test_it_ends_close_below_the_limit(limit: float) -> None:
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = search(holds, 1.0, 1.1, 20)
    assert found is not None
    assert limit / 1.1 <= found <= limit
    assert len(set(tried)) == len(tried)


def test_it_tries_no_more_often_than_it_may() -> None:
    tried: list[float] = []
    assert search(lambda rate: not tried.append(rate), 1.0, 1.1, 3) == 4.0
    assert tried == [1.0, 2.0, 4.0]


def test_where_it_never_holds_there_is_no_answer() -> None:
    assert search(lambda rate: False, 8.0, 1.1, 5) is None


@pytest.mark.parametrize(("first", "precision", "most"), [(0, 1.1, 5), (1, 1.0, 5), (1, 1.1, 0)])
def test_a_search_that_could_not_end_is_refused(first: float, precision: float, most: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        search(lambda rate: True, first, precision, most)
