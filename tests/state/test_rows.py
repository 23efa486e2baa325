"""Rows and pages: nothing leaks, nothing is handed out twice, and nobody's slots are another's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from numpy.typing import NDArray

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


@dataclass
class Sequence:
    """What a row has written, one token a position, and how many pages it was given."""

    tokens: list[int] = field(default_factory=list)
    num_pages: int = 0


@dataclass(frozen=True)
class Held:
    pages: tuple[int, ...]
    tokens: tuple[int, ...]


class SharedPagesMachine(RuleBasedStateMachine):
    """Rows write tokens, all different, into one memory; snapshots hold pages of it and other rows begin with them.
    Whatever the order, everybody reads what was written for it."""

    ROWS, PAGES, MOST = 4, 9, 4 * PAGE
    rows = st.integers(1, ROWS)

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.ROWS + 1, self.PAGES, self.MOST - 5)  # the last page may be filled all the same
        self.memory = np.zeros((self.PAGES + 1) * PAGE, dtype=np.int64)
        self.live: dict[int, Sequence] = {}
        self.held: list[Held] = []
        self.next_token = 1

    def references(self) -> Counter[int]:
        rows = [self.pool.table[row, : each.num_pages].tolist() for row, each in self.live.items()]
        return Counter(page for pages in (*rows, *(each.pages for each in self.held)) for page in pages)

    def tables(self) -> tuple[bytes, int]:
        return self.pool.table.tobytes(), self.pool.num_free

    def draw_live(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.live)), label="row")

    @rule(row=rows, positions=st.integers(0, MOST + 40))
    def grow(self, row: int, positions: int) -> None:
        have = self.live[row].num_pages if row in self.live else 0
        wanted = max(pages_for(positions) - have, 0)
        assert self.pool.missing(row, positions) == wanted
        before = self.tables()
        if positions > self.MOST:
            with pytest.raises(ValueError, match="more than the 256"):
                self.pool.grow(row, positions)
            assert self.tables() == before
        elif wanted > before[1]:
            with pytest.raises(OutOfRows, match=f"{wanted} pages wanted, {before[1]} of {self.PAGES} free"):
                self.pool.grow(row, positions)
            assert self.tables() == before
        else:
            self.pool.grow(row, positions)
            self.live.setdefault(row, Sequence()).num_pages += wanted
            assert self.pool.missing(row, positions) == 0
            assert self.pool.num_free == before[1] - wanted

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 2 * PAGE))
    def write(self, data: st.DataObject, count: int) -> None:
        row = self.draw_live(data)
        sequence = self.live[row]
        start = len(sequence.tokens)
        count = min(count, sequence.num_pages * PAGE - start)
        tokens = np.arange(self.next_token, self.next_token + count)
        self.memory[self.slots(row, start, start + count)] = tokens
        sequence.tokens += tokens.tolist()
        self.next_token += count

    @precondition(lambda self: self.live)
    @rule(data=st.data(), spare=st.integers(0, PAGE))
    def trim(self, data: st.DataObject, spare: int) -> None:
        row = self.draw_live(data)
        sequence = self.live[row]
        positions = len(sequence.tokens) + spare
        self.pool.trim(row, positions)
        sequence.num_pages = min(sequence.num_pages, pages_for(positions))

    @precondition(lambda self: self.live and len(self.held) < 8)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        row = self.draw_live(data)
        sequence = self.live[row]
        positions = data.draw(st.integers(0, len(sequence.tokens)), label="positions")
        pages = self.pool.hold(row, positions)
        assert pages == tuple(self.pool.table[row, : pages_for(positions)])
        self.held.append(Held(pages, tuple(sequence.tokens[:positions])))
        with pytest.raises(ValueError, match="has no pages for"):
            self.pool.hold(row, sequence.num_pages * PAGE + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1), label="held"))
        self.pool.drop(held.pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), row=rows)
    def adopt(self, data: st.DataObject, row: int) -> None:
        held = data.draw(st.sampled_from(self.held), label="held")
        positions = len(held.tokens)
        before = self.tables()
        if row in self.live and self.live[row].num_pages:
            with pytest.raises(ValueError, match="has its pages already"):
                self.pool.adopt(row, held.pages, positions)
            assert self.tables() == before
        elif positions % PAGE and not before[1]:
            with pytest.raises(OutOfRows, match="1 page wanted, 0 of"):
                self.pool.adopt(row, held.pages, positions)
            assert self.tables() == before
        else:
            copy = self.pool.adopt(row, held.pages, positions)
            assert (copy is not None) == bool(positions % PAGE)
            if copy is not None:
                source, target = copy
                assert source == held.pages[-1]
                assert target == self.pool.table[row, len(held.pages) - 1]
                self.memory[target * PAGE : (target + 1) * PAGE] = self.memory[source * PAGE : (source + 1) * PAGE]
            assert self.pool.num_free == before[1] - bool(positions % PAGE)
            self.live[row] = Sequence(list(held.tokens), len(held.pages))

    @rule(row=rows)
    def free(self, row: int) -> None:
        if row in self.live:
            self.pool.free(row)
            del self.live[row]
        with pytest.raises(KeyError):
            self.pool.free(row)

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def drop_what_nobody_has(self, data: st.DataObject) -> None:
        references = self.references()
        free = [page for page in range(1, self.PAGES + 1) if not references[page]]
        before = self.tables()
        with pytest.raises(ValueError, match="is not held"):
            self.pool.drop([*references, data.draw(st.sampled_from(free), label="page")])
        assert self.tables() == before

    def slots(self, row: int, start: int, end: int) -> NDArray[np.int64]:
        return self.pool.slots(np.array([[row]]), np.arange(start, end)[None, :])[0]

    @invariant()
    def a_page_is_free_exactly_when_nobody_has_it(self) -> None:
        self.pool.check(list(self.live), [each.pages for each in self.held])
        references = self.references()
        assert 0 not in references
        assert self.pool.num_free == self.PAGES - len(references)
        for row in range(self.ROWS + 1):
            num_pages = self.live[row].num_pages if row in self.live else 0
            assert (self.pool.table[row, :num_pages] > 0).all()
            assert (self.pool.table[row, num_pages:] == 0).all()

    @invariant()
    def everybody_reads_what_was_written_for_it(self) -> None:
        for row, sequence in self.live.items():
            assert self.memory[self.slots(row, 0, len(sequence.tokens))].tolist() == sequence.tokens
        for held in self.held:
            pages = self.memory.reshape(-1, PAGE)[list(held.pages)].reshape(-1)
            assert tuple(pages[: len(held.tokens)].tolist()) == held.tokens

    @invariant()
    def check_counts_owners_and_holders(self) -> None:
        for index, held in enumerate(self.held):
            if held.pages:
                others = [each.pages for each in self.held[:index] + self.held[index + 1 :]]
                with pytest.raises(AssertionError, match="leaked"):
                    self.pool.check(list(self.live), others)
        with pytest.raises(AssertionError, match="do not live"):
            self.pool.check([*self.live, self.ROWS + 7], [each.pages for each in self.held])


TestSharedPages = SharedPagesMachine.TestCase
TestSharedPages.settings = SETTINGS


def test_a_row_grows_by_what_it_lacks():
    pool = PagePool(3, 4, 3 * PAGE)
    pool.grow(1, 0)
    pool.check([1])  # it lives, without a page
    pool.grow(1, PAGE)
    pool.grow(1, PAGE + 1)
    pool.grow(1, 1)
    assert pool.table[1].tolist() == [1, 2, 0]
    assert pool.num_free == 2


def test_a_failed_growth_changes_nothing():
    pool = PagePool(3, 2, 8 * PAGE)
    pool.grow(1, PAGE)
    with pytest.raises(OutOfRows, match="2 pages wanted, 1 of 2 free"):
        pool.grow(2, 2 * PAGE)
    with pytest.raises(ValueError, match="513 positions are more than the 512 that a row may have"):
        pool.grow(1, 8 * PAGE + 1)
    pool.check([1])
    assert not pool.table[2].any()


def test_a_row_takes_its_pages_whole_after_it_has_given_all_back():
    pool = PagePool(3, 4, 4 * PAGE)
    pool.grow(1, 2 * PAGE)
    pool.trim(1, 0)
    pool.check([1])
    pool.reserve(1, 3 * PAGE)
    with pytest.raises(ValueError, match="row 1 has its pages already"):
        pool.reserve(1, PAGE)
    pool.check([1])


def test_freed_pages_go_out_again_in_the_same_order():
    pool = PagePool(3, 5, 4 * PAGE)
    pool.grow(1, 3 * PAGE)
    pages = pool.hold(1, 3 * PAGE)
    pool.free(1)
    pool.drop(pages)
    pool.grow(2, 4 * PAGE)
    assert pool.table[2].tolist() == [1, 2, 3, 4]


def test_a_held_page_outlives_its_row():
    pool = PagePool(3, 2, 2 * PAGE)
    pool.grow(1, PAGE + 1)
    pages = pool.hold(1, PAGE + 1)
    pool.free(1)
    assert pool.num_free == 0
    pool.check([], [pages])
    pool.drop(pages)
    assert pool.num_free == 2
    pool.check([])


def test_a_row_that_adopts_full_pages_needs_none():
    pool = PagePool(3, 2, 2 * PAGE)
    pool.grow(1, 2 * PAGE)
    pages = pool.hold(1, 2 * PAGE)
    assert pool.adopt(2, pages, 2 * PAGE) is None
    assert pool.table[2].tolist() == list(pages)
    pool.check([1, 2], [pages])


def test_a_row_that_adopts_a_part_of_a_page_needs_one_to_copy_it_into():
    pool = PagePool(4, 3, 2 * PAGE)
    pool.grow(1, PAGE + 9)
    pages = pool.hold(1, PAGE + 9)
    assert pool.adopt(2, pages, PAGE + 9) == (pages[1], 3)
    assert pool.table[2].tolist() == [pages[0], 3]
    with pytest.raises(OutOfRows, match="1 page wanted, 0 of 3 free"):
        pool.adopt(3, pages, PAGE + 9)
    pool.check([1, 2], [pages])


def test_a_row_that_adopts_nothing_lives_without_a_page():
    pool = PagePool(3, 2, 2 * PAGE)
    assert pool.adopt(1, (), 0) is None
    pool.check([1])
    pool.free(1)
    pool.check([])


@pytest.mark.parametrize(("pages", "positions"), [((1,), PAGE + 1), ((1, 2), PAGE), ((), 1)])
def test_adopted_pages_are_those_of_the_positions(pages, positions):
    pool = PagePool(3, 4, 2 * PAGE)
    pool.grow(1, 2 * PAGE)
    with pytest.raises(ValueError, match="positions in"):
        pool.adopt(2, pages, positions)
    pool.check([1])


def test_a_row_adopts_no_more_than_the_table_holds():
    pool = PagePool(4, 4, 2 * PAGE)
    pool.grow(1, 2 * PAGE)
    pool.grow(2, PAGE)
    with pytest.raises(ValueError, match="192 positions are more than the 128 that a row may have"):
        pool.adopt(3, (1, 2, 3), 3 * PAGE)
    pool.check([1, 2])


def test_nobody_adopts_a_page_that_is_free():
    pool = PagePool(3, 4, 2 * PAGE)
    with pytest.raises(ValueError, match="page 4 is not held"):
        pool.adopt(1, (4,), PAGE)
    pool.check([])


@pytest.mark.parametrize("pages", [(1, 1, 1), (2,), (0,), (5,)])
def test_a_hold_is_released_once_or_not_at_all(pages):
    pool = PagePool(3, 4, 2 * PAGE)
    pool.grow(1, PAGE)
    held = pool.hold(1, PAGE)  # row and snapshot have page 1
    with pytest.raises(ValueError, match="is not held"):
        pool.drop(pages)
    pool.check([1], [held])


def test_a_page_counts_as_owned_once_and_only_by_rows():
    pool = PagePool(4, 4, 4 * PAGE)
    pool.grow(1, 2 * PAGE)
    pages = pool.hold(1, 2 * PAGE)
    pool.adopt(2, pages, 2 * PAGE)
    assert (pool.num_owned, pool.num_free) == (2, 2)
    pool.free(1)
    pool.trim(2, PAGE)
    assert (pool.num_owned, pool.num_free) == (1, 2)
    pool.free(2)
    assert (pool.num_owned, pool.num_free) == (0, 2)
    pool.drop(pages)
    assert (pool.num_owned, pool.num_free) == (0, 4)


def test_pages_can_be_held_again_only_while_somebody_has_them():
    pool = PagePool(3, 4, 4 * PAGE)
    pool.grow(1, PAGE)
    pages = pool.hold(1, PAGE)
    pool.free(1)
    pool.share(pages)
    pool.check([], [pages, pages])
    pool.drop(pages)
    pool.drop(pages)
    with pytest.raises(ValueError, match="page 1 is not held"):
        pool.share(pages)


def test_a_row_s_capacity_is_its_pages_and_the_free_ones_as_far_as_the_table_goes():
    pool = PagePool(3, 5, 3 * PAGE)
    assert pool.capacity(1) == 3 * PAGE
    pool.grow(2, 3 * PAGE)
    assert (pool.capacity(1), pool.capacity(2)) == (2 * PAGE, 3 * PAGE)
    pool.grow(1, 2 * PAGE)
    assert pool.capacity(1) == 2 * PAGE


def test_rows_that_lack_a_page_for_their_next_position_are_found():
    pool = PagePool(4, 6, 2 * PAGE)
    pool.grow(1, PAGE)
    pool.grow(2, 0)
    pool.grow(3, 2 * PAGE)
    rows = np.array([1, 1, 2, 3, 3])
    positions = np.array([PAGE - 1, PAGE, 0, 2 * PAGE - 1, 2 * PAGE])  # the last is beyond what a row may have
    assert pool.lacking(rows, positions).tolist() == [False, True, True, False, True]


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
