"""Rows and pages as integers. Knows no tensors and no requests.

A row is a live sequence's place in every arena; row 0 and page 0 are padding, real memory that
belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PAGE = 64
"""Stage positions of one KV page."""


class OutOfRows(RuntimeError):
    """No row, or not enough pages, are free."""


class RowPool:
    """Hands out rows 1…capacity, lowest first."""

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

    A row's pages are reserved whole when it is admitted; `table` [rows, pages a row may have]
    is what attention reads, with page 0 where nothing is reserved.
    """

    def __init__(self, num_rows: int, num_pages: int, max_positions: int) -> None:
        self.num_pages = num_pages
        self._row_pages = pages_for(max_positions)
        self.table: NDArray[np.int64] = np.zeros((num_rows, self._row_pages), dtype=np.int64)
        self._free = list(range(num_pages, 0, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_reserve(self, positions: int) -> bool:
        return pages_for(positions) <= len(self._free) and pages_for(positions) <= self._row_pages

    def reserve(self, row: int, positions: int) -> None:
        """Gives `row` pages for that many positions; raises OutOfRows if they are not free."""
        if row in self._owned:
            raise ValueError(f"row {row} has its pages already")
        if not self.can_reserve(positions):
            raise OutOfRows(f"{pages_for(positions)} pages wanted, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(pages_for(positions))]
        self._owned[row] = pages
        self.table[row, : len(pages)] = pages

    def free(self, row: int) -> None:
        self._free.extend(reversed(self._owned.pop(row)))
        self.table[row] = 0

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R, L] slots of the rows' positions; rows: [R, 1]."""
        return self.table[rows, positions // PAGE] * PAGE + positions % PAGE

    def check(self, live: Sequence[int]) -> None:
        """Raises AssertionError unless free + owned = all, each once, owned by the live rows alone."""
        owned = [page for pages in self._owned.values() for page in pages]
        assert sorted([*self._free, *owned]) == list(range(1, self.num_pages + 1)), "pages leaked"
        assert sorted(self._owned) == sorted(live), "pages are owned by rows that do not live"


class RingSlots:
    """Rings of a windowed stage: each row keeps its last `capacity` positions."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R, L] slots of the rows' positions; rows: [R, 1]."""
        return rows * self.capacity + positions % self.capacity


def pages_for(positions: int) -> int:
    return -(-positions // PAGE)
