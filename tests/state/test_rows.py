"""Rows and pages: nothing leaks, nothing is handed out twice, and nobody's slots are another's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hnet_runtime.state.rows import PAGE, OutOfRows, PagePool, RingSlots, RowPool, pages_for

SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


# ── rows ──────────────────────────────────────────────────────────────────────────────────────


class RowPoolMachine(RuleBasedStateMachine):
    CAPACITY = 5
    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.pool = RowPool(self.CAPACITY)
        self.live: set[int] = set()

    @rule(target=rows)
    def allocate(self) -> object:
        if len(self.live) == self.CAPACITY:
            with pytest.raises(OutOfRows):
                self.pool.allocate()
            return None
        row = self.pool.allocate()
        assert 1 <= row <= self.CAPACITY  # never row 0
        assert row not in self.live
        self.live.add(row)
        return row

    @rule(row=consumes(rows))
    def free(self, row: int | None) -> None:
        if row is None:
            return
        self.pool.free(row)
        self.live.remove(row)
        with pytest.raises(KeyError):
            self.pool.free(row)  # twice

    @rule(row=st.integers(-1, CAPACITY + 1))
    def free_what_nobody_has(self, row: int) -> None:
        if row not in self.live:
            with pytest.raises(KeyError):
                self.pool.free(row)

    @invariant()
    def every_row_is_free_or_live(self) -> None:
        self.pool.check()
        assert self.pool.num_live == len(self.live)
        assert self.pool.num_free == self.CAPACITY - len(self.live)


TestRowPool = RowPoolMachine.TestCase
TestRowPool.settings = SETTINGS


def test_rows_are_handed_out_lowest_first_and_all_of_them():
    pool = RowPool(4)
    assert [pool.allocate() for _ in range(4)] == [1, 2, 3, 4]


def test_check_finds_a_row_that_leaked():
    pool = RowPool(3)
    pool.allocate()
    pool._live.clear()
    with pytest.raises(AssertionError, match="leaked"):
        pool.check()


# ── pages ─────────────────────────────────────────────────────────────────────────────────────


class PagePoolMachine(RuleBasedStateMachine):
    ROWS, PAGES, MOST = 5, 9, 4 * PAGE + 3

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.ROWS + 1, self.PAGES, self.MOST)
        self.reserved: dict[int, int] = {}

    @property
    def num_taken(self) -> int:
        return sum(pages_for(positions) for positions in self.reserved.values())

    @rule(row=st.integers(1, ROWS), positions=st.integers(1, MOST + 2 * PAGE))
    def reserve(self, row: int, positions: int) -> None:
        pages = pages_for(positions)
        fits = pages <= self.PAGES - self.num_taken and pages <= pages_for(self.MOST)
        assert self.pool.can_reserve(positions) == fits
        if row in self.reserved:
            with pytest.raises(ValueError, match=f"row {row} has its pages already"):
                self.pool.reserve(row, positions)
        elif not fits:
            with pytest.raises(OutOfRows):
                self.pool.reserve(row, positions)
        else:
            self.pool.reserve(row, positions)
            self.reserved[row] = positions

    @rule(row=st.integers(0, ROWS))
    def free(self, row: int) -> None:
        if row in self.reserved:
            self.pool.free(row)
            del self.reserved[row]
        with pytest.raises(KeyError):
            self.pool.free(row)  # never reserved, or freed twice

    @invariant()
    def pages_are_conserved_and_never_shared(self) -> None:
        self.pool.check(list(self.reserved))
        assert self.pool.num_free == self.PAGES - self.num_taken
        owned = [page for row in self.reserved for page in self.pool.table[row] if page]
        assert len(owned) == len(set(owned)) == self.num_taken
        assert all(1 <= page <= self.PAGES for page in owned)
        for row in range(self.ROWS + 1):
            count = pages_for(self.reserved.get(row, 0))
            assert (self.pool.table[row, :count] > 0).all()  # page 0 is nobody's
            assert (self.pool.table[row, count:] == 0).all()

    @invariant()
    def no_two_positions_of_live_rows_have_one_slot(self) -> None:
        slots = [
            slot
            for row, positions in self.reserved.items()
            for slot in self.pool.slots(np.array([[row]]), np.arange(positions)[None, :])[0]
        ]
        assert len(slots) == len(set(slots))
        assert all(PAGE <= slot < (self.PAGES + 1) * PAGE for slot in slots)

    @invariant()
    def check_knows_who_lives(self) -> None:
        if self.reserved:
            with pytest.raises(AssertionError, match="do not live"):
                self.pool.check(list(self.reserved)[1:])
        with pytest.raises(AssertionError, match="do not live"):
            self.pool.check([*self.reserved, self.ROWS + 7])


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = SETTINGS


def test_a_failed_reservation_takes_nothing():
    pool = PagePool(3, 2, 8 * PAGE)
    pool.reserve(1, PAGE)
    with pytest.raises(OutOfRows, match="2 pages wanted, 1 of 2 free"):
        pool.reserve(2, 2 * PAGE)
    pool.check([1])
    assert not pool.table[2].any()
    pool.reserve(2, PAGE)


def test_check_finds_a_page_that_leaked():
    pool = PagePool(3, 4, 4 * PAGE)
    pool.reserve(1, 2 * PAGE)
    pool._owned[1].pop()
    with pytest.raises(AssertionError, match="leaked"):
        pool.check([1])


def test_a_row_that_no_longer_has_pages_points_at_page_0():
    pool = PagePool(3, 4, 4 * PAGE)
    pool.reserve(2, 3 * PAGE)
    pool.free(2)
    assert (pool.slots(np.array([[2]]), np.arange(4 * PAGE)[None, :]) < PAGE).all()


@given(st.integers(0, 10_000))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pages_for_is_the_fewest_that_hold_the_positions(positions):
    pages = pages_for(positions)
    assert pages * PAGE >= positions > (pages - 1) * PAGE


# ── rings ─────────────────────────────────────────────────────────────────────────────────────


@given(capacity=st.integers(1, 130), lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rings_keep_each_rows_newest_positions_apart_from_all_others(capacity, lengths):
    ring = RingSlots(capacity)
    slots = []
    for row, length in enumerate(lengths, start=1):
        newest = np.arange(max(length - capacity, 0), length)[None, :]
        slots += ring.slots(np.array([[row]]), newest)[0].tolist()
    assert len(slots) == len(set(slots))
    assert all(capacity <= slot < (len(lengths) + 1) * capacity for slot in slots)  # the first ring is row 0's


def test_a_ring_takes_a_position_where_it_left_the_one_before_the_window():
    ring = RingSlots(7)
    for position in range(50):
        (slots,) = ring.slots(np.array([[3]]), np.array([[position, position + 7]]))
        assert slots[0] == slots[1]
