"""Rows and pages as integers. Knows no tensors and no requests.

A row is a live sequence's place in every arena; row 0 and page 0 are padding, real memory that
belongs to nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE = 64
"""Stage positions of one KV page."""


class OutOfRows(RuntimeError):
    """No row, or not enough pages, are free."""


class RowPool:
    """Hands out rows 1…capacity: the one freed last, then those never used, lowest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity, 0, -1))
        self._live: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def allocate(self) -> int:
        if not self._free:
            raise OutOfRows(f"all {self.capacity} rows are taken")
        row = self._free.pop()
        self._live.add(row)
        return row

    def free(self, row: int) -> None:
        self._live.remove(row)  # KeyError: freed twice, or never allocated
        self._free.append(row)

    def check(self) -> None:
        """Raises AssertionError unless free + live = all, each once."""
        assert sorted([*self._free, *self._live]) == list(range(1, self.capacity + 1)), "rows leaked"


class PagePool:
    """KV pages of one stage, counted in positions of that stage, and every row's page table.

    A row joins with `reserve`, `grow` or `adopt`, be it with no page, and leaves with `free`. `table`
    [rows, pages a row may have] is what attention reads, with page 0 where a row has none. Rows and snapshots share
    pages by counting who has them: a page whose count falls to zero is free, and the one freed last goes out first.

    What a page contains is not known here. Sharing is sound because a row writes its positions in order and once: a
    full page is never written again, and a holder of one partly filled reads no further than the row had come.
    """

    def __init__(self, num_rows: int, num_pages: int, max_positions: int) -> None:
        self.num_pages = num_pages
        self._row_pages = pages_for(max_positions)
        self.table: NDArray[np.int64] = np.zeros((num_rows, self._row_pages), dtype=np.int64)
        self._free = list(range(num_pages, 0, -1))
        self._owned: dict[int, list[int]] = {}
        self._counts = [0] * (num_pages + 1)  # by page: rows that own it + snapshots that hold it
        self._owners = [0] * (num_pages + 1)  # by page: rows that own it
        self._num_owned = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Pages that rows own, each once; snapshots alone hold the others that are not free."""
        return self._num_owned

    def can_reserve(self, positions: int) -> bool:
        return pages_for(positions) <= len(self._free) and pages_for(positions) <= self._row_pages

    def reserve(self, row: int, positions: int) -> None:
        """Gives `row`, which has none, pages for that many positions; raises OutOfRows if they are not free."""
        if self._owned.get(row):
            raise ValueError(f"row {row} has its pages already")
        if not self.can_reserve(positions):
            raise OutOfRows(f"{pages_for(positions)} pages wanted, {len(self._free)} of {self.num_pages} free")
        self.grow(row, positions)

    def missing(self, row: int, positions: int) -> int:
        """Pages that `row` lacks to hold that many positions."""
        return max(pages_for(positions) - len(self._owned.get(row, ())), 0)

    def slack(self, row: int, positions: int) -> int:
        """Positions that `row` has pages for beyond so many."""
        return len(self._owned[row]) * PAGE - positions

    def lacking(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[R] whether each row lacks a page for position number `positions` (counted from 0), when it has those of all
        before."""
        pages = positions // PAGE
        beyond: NDArray[np.bool_] = pages >= self._row_pages
        lacks: NDArray[np.bool_] = beyond | (self.table[rows, np.minimum(pages, self._row_pages - 1)] == 0)
        return lacks

    def grow(self, row: int, positions: int) -> None:
        """Gives `row` pages until it holds that many positions.

        Raises OutOfRows, changing nothing, if too few are free; ValueError beyond what the table holds.
        """
        self._fit(positions)
        wanted = self.missing(row, positions)
        if wanted > len(self._free):
            raise OutOfRows(f"{wanted} pages wanted, {len(self._free)} of {self.num_pages} free")
        self._extend(row, [self._take() for _ in range(wanted)])

    def trim(self, row: int, positions: int) -> None:
        """Returns the row's pages beyond that many positions: what it was given and did not write."""
        owned = self._owned[row]
        kept = pages_for(positions)
        self._disown(owned[kept:])
        del owned[kept:]
        self.table[row, kept:] = 0

    def free(self, row: int) -> None:
        self._disown(self._owned.pop(row))  # KeyError: freed twice, or never joined
        self.table[row] = 0

    def capacity(self, row: int) -> int:
        """Positions that `row` can hold in the pages it has and the free ones."""
        return min(len(self._owned.get(row, ())) + len(self._free), self._row_pages) * PAGE

    def hold(self, row: int, positions: int) -> tuple[int, ...]:
        """The pages of the row's first `positions`, each held once more. The row goes on writing behind them in the
        last page. Raises ValueError if it has not that many."""
        if self.missing(row, positions):
            raise ValueError(f"row {row} has no pages for {positions} positions")
        pages = tuple(self._owned[row][: pages_for(positions)])
        self.share(pages)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Holds pages once more that somebody holds; ValueError, changing nothing, if nobody does."""
        self._require_counted(pages)
        for page in pages:
            self._counts[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """Releases one hold of each page; ValueError, changing nothing, if there is none."""
        self._require_counted(pages)
        for page in reversed(pages):
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free.append(page)

    def adopt(self, row: int, pages: Sequence[int], positions: int) -> tuple[int, int] | None:
        """`row`, which has no page, begins with `positions` in pages that somebody holds, and shares the full ones.

        It writes into the last one if that is partly filled: a fresh page stands for it, and (source, target) says
        which page the caller copies into it, before it drops its own hold of source. Raises OutOfRows, changing
        nothing, if no page is free for that.
        """
        self._fit(positions)
        self._require_counted(pages)
        if self._owned.get(row):
            raise ValueError(f"row {row} has its pages already")
        if len(pages) != pages_for(positions):
            raise ValueError(f"{positions} positions in {len(pages)} pages")
        shared = list(pages[: positions // PAGE])
        copied = pages[len(shared) :]
        if copied and not self._free:
            raise OutOfRows(f"1 page wanted, 0 of {self.num_pages} free")
        self.share(shared)
        fresh = [self._take() for _ in copied]
        self._extend(row, shared + fresh)
        return (copied[0], fresh[0]) if copied else None

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R, L] slots of the rows' positions; rows: [R, 1]."""
        return self.table[rows, positions // PAGE] * PAGE + positions % PAGE

    def check(self, live: Sequence[int], held: Iterable[Sequence[int]] = ()) -> None:
        """Raises AssertionError unless free + referenced = all, each page is counted once for every row that owns it
        and every tuple of `held` (what snapshots hold) that names it, and the live rows alone own pages."""
        counts = Counter(page for pages in (*self._owned.values(), *held) for page in pages)
        assert sorted([*self._free, *counts]) == list(range(1, self.num_pages + 1)), "pages leaked"
        assert self._counts == [counts[page] for page in range(self.num_pages + 1)], "pages leaked: counts are wrong"
        owners = Counter(page for pages in self._owned.values() for page in pages)
        assert self._owners == [owners[page] for page in range(self.num_pages + 1)], "owners are wrong"
        assert self._num_owned == len(owners), "the number of owned pages is wrong"
        assert sorted(self._owned) == sorted(live), "pages are owned by rows that do not live"
        for row, pages in self._owned.items():
            assert self.table[row].tolist() == pages + [0] * (self._row_pages - len(pages)), "the table is wrong"

    def _take(self) -> int:
        page = self._free.pop()
        self._counts[page] = 1
        return page

    def _extend(self, row: int, pages: list[int]) -> None:
        owned = self._owned.setdefault(row, [])
        self.table[row, len(owned) : len(owned) + len(pages)] = pages
        owned.extend(pages)
        for page in pages:
            self._owners[page] += 1
            self._num_owned += self._owners[page] == 1

    def _disown(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            self._num_owned -= self._owners[page] == 0
        self.drop(pages)

    def _fit(self, positions: int) -> None:
        if pages_for(positions) > self._row_pages:
            raise ValueError(f"{positions} positions are more than the {self._row_pages * PAGE} that a row may have")

    def _require_counted(self, pages: Sequence[int]) -> None:
        for page, count in Counter(pages).items():
            if not 0 < page <= self.num_pages or self._counts[page] < count:
                raise ValueError(f"page {page} is not held {count} times")


@dataclass(frozen=True)
class StagePages:
    """The pages of one stage, and [rows] how many positions of it each row has run (kept by who runs them)."""

    stage: int
    pool: PagePool
    positions: NDArray[np.int64]


class RingSlots:
    """Rings of a windowed stage: each row keeps its last `capacity` positions."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R, L] slots of the rows' positions; rows: [R, 1]."""
        return rows * self.capacity + positions % self.capacity


def pages_for(positions: int) -> int:
    return -(-positions // PAGE)
