"""Spans against lists of (row, time) pairs handled one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.ops.spans import Spans

CPU = torch.device("cpu")
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@dataclass
class Naive:
    """The same spans as plain lists. Places are found by searching the packed list."""

    rows: list[int]
    starts: list[int]
    lengths: list[int]

    @property
    def packed(self) -> list[tuple[int, int]]:
        """(span, time) in packed order: time outermost, spans in order, those that are over left out."""
        longest = max(self.lengths, default=0)
        return [(i, t) for t in range(longest) for i in range(len(self.rows)) if t < self.lengths[i]]

    def place(self, span: int, time: int) -> int:
        return self.packed.index((span, time))


def sorted_spans(rows: list[int], starts: list[int], lengths: list[int]) -> tuple[Naive, list[int]]:
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])  # Python's sort is stable
    return Naive([rows[i] for i in order], [starts[i] for i in order], [lengths[i] for i in order]), order


@st.composite
def pieces(draw: st.DrawFn, max_length: int = 9) -> tuple[list[int], list[int], list[int]]:
    rows = draw(st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True))
    starts = draw(st.lists(st.integers(0, 300), min_size=len(rows), max_size=len(rows)))
    longest = draw(st.sampled_from([1, 2, max_length]))
    lengths = draw(st.lists(st.integers(1, longest), min_size=len(rows), max_size=len(rows)))
    return rows, starts, lengths


@SETTINGS
@given(pieces())
def test_positions_are_packed_with_time_outermost_and_longest_spans_first(piece):
    spans, order = Spans.of(*piece, CPU)
    naive, expected_order = sorted_spans(*piece)
    assert order.tolist() == expected_order
    assert len(spans) == len(naive.rows)
    assert spans.rows.tolist() == naive.rows
    assert spans.row_index.tolist() == naive.rows
    assert spans.starts.tolist() == naive.starts
    assert spans.lengths.tolist() == naive.lengths
    assert spans.total == len(naive.packed)
    assert spans.longest == max(naive.lengths)
    assert spans.is_step == (spans.longest == 1)
    assert spans.span_of.tolist() == [i for i, _ in naive.packed]
    assert spans.time_of.tolist() == [t for _, t in naive.packed]
    assert spans.position_of.tolist() == [naive.starts[i] + t for i, t in naive.packed]


@SETTINGS
@given(pieces())
def test_counts_and_offsets_slice_the_packed_positions_by_time(piece):
    spans, _ = Spans.of(*piece, CPU)
    naive, _ = sorted_spans(*piece)
    assert spans.counts.tolist() == [sum(t < length for length in naive.lengths) for t in range(spans.longest)]
    assert len(spans.offsets) == spans.longest + 1
    for time in range(spans.longest):
        begin, end = int(spans.offsets[time]), int(spans.offsets[time + 1])
        assert naive.packed[begin:end] == [(i, time) for i in range(int(spans.counts[time]))]


@SETTINGS
@given(pieces())
def test_last_and_padded_places_are_those_of_the_span(piece):
    spans, _ = Spans.of(*piece, CPU)
    naive, _ = sorted_spans(*piece)
    assert spans.last.tolist() == [naive.place(i, length - 1) for i, length in enumerate(naive.lengths)]
    padded = spans.padded_index.tolist()
    assert len(padded) == len(naive.rows)
    for i, row in enumerate(padded):
        assert row == [naive.place(i, t) if t < naive.lengths[i] else 0 for t in range(spans.longest)]


@SETTINGS
@given(pieces(), st.integers(1, 5))
def test_history_holds_carried_positions_before_the_spans_own(piece, depth):
    spans, _ = Spans.of(*piece, CPU)
    naive, _ = sorted_spans(*piece)
    # What stands at each place of the source: (span, time), carried ones at negative times, oldest first.
    source = [(i, back - depth) for i in range(len(naive.rows)) for back in range(depth)] + naive.packed
    window, carry = (index.tolist() for index in spans.history_index(depth))
    for (i, t), found in zip(naive.packed, window, strict=True):
        assert [source[place] for place in found] == [(i, t - back) for back in range(depth, -1, -1)]
    for i, found in enumerate(carry):
        end = naive.lengths[i]
        assert [source[place] for place in found] == [(i, end - back) for back in range(depth, 0, -1)]


@SETTINGS
@given(pieces())
def test_a_predecessor_is_the_carried_position_only_at_a_spans_beginning(piece):
    spans, _ = Spans.of(*piece, CPU)
    naive, _ = sorted_spans(*piece)
    source = [(i, -1) for i in range(len(naive.rows))] + naive.packed
    assert [source[place] for place in spans.predecessor.tolist()] == [(i, t - 1) for i, t in naive.packed]


@st.composite
def selections(draw: st.DrawFn):
    piece = draw(pieces())
    total = sum(piece[2])
    density = draw(st.sampled_from([0, 1, 2, 4]))  # none, half, most, nearly all
    chosen = draw(st.lists(st.integers(0, max(density, 1)), min_size=total, max_size=total))
    starts = draw(st.lists(st.integers(0, 300), min_size=len(piece[0]), max_size=len(piece[0])))
    return piece, np.array([density > 0 and bool(x) for x in chosen], dtype=bool), starts


@SETTINGS
@given(selections())
def test_selected_positions_become_the_spans_of_the_next_stage(selection):
    piece, chosen, inner_starts = selection
    spans, _ = Spans.of(*piece, CPU)
    naive, _ = sorted_spans(*piece)
    inner, places, newest = spans.select(chosen, np.array(inner_starts, dtype=np.int64))

    times = [[t for t in range(length) if chosen[naive.place(i, t)]] for i, length in enumerate(naive.lengths)]
    kept = sorted((i for i in range(len(times)) if times[i]), key=lambda i: -len(times[i]))
    inner_naive = Naive([naive.rows[i] for i in kept], [inner_starts[i] for i in kept], [len(times[i]) for i in kept])
    assert inner.rows.tolist() == inner_naive.rows
    assert inner.starts.tolist() == inner_naive.starts
    assert inner.lengths.tolist() == inner_naive.lengths
    assert inner.total == int(chosen.sum())
    assert places.tolist() == [naive.place(kept[j], times[kept[j]][n]) for j, n in inner_naive.packed]

    for (i, t), found in zip(naive.packed, newest.tolist(), strict=True):
        up_to = [n for n, time in enumerate(times[i]) if time <= t]
        if up_to:
            assert found == len(naive.rows) + inner_naive.place(kept.index(i), up_to[-1])
        else:
            assert found == i


@SETTINGS
@given(selections())
def test_a_selection_of_a_selection_still_packs_like_any_spans(selection):
    piece, chosen, inner_starts = selection
    spans, _ = Spans.of(*piece, CPU)
    inner, _, _ = spans.select(chosen, np.array(inner_starts, dtype=np.int64))
    naive = Naive(inner.rows.tolist(), inner.starts.tolist(), inner.lengths.tolist())
    assert inner.span_of.tolist() == [i for i, _ in naive.packed]
    assert inner.position_of.tolist() == [naive.starts[i] + t for i, t in naive.packed]
    assert inner.longest == max(naive.lengths, default=0)
    every_other = np.arange(inner.total) % 2 == 0
    again, places, newest = inner.select(every_other, inner.starts)
    assert again.total == int(every_other.sum()) == len(places)
    assert len(newest) == inner.total


@SETTINGS
@given(pieces())
def test_consecutive_rows_are_a_slice_and_others_none(piece):
    spans, _ = Spans.of(*piece, CPU)
    for begin in range(len(spans)):
        for end in range(begin + 1, len(spans) + 1):
            rows = spans.rows[begin:end].tolist()
            run = spans.consecutive(slice(begin, end))
            if rows == list(range(rows[0], rows[0] + len(rows))):
                assert run == slice(rows[0], rows[0] + len(rows))
            else:
                assert run is None


def test_a_step_keeps_the_callers_order():
    spans, order = Spans.of([9, 2, 5], [7, 0, 3], [1, 1, 1], CPU)
    assert order.tolist() == [0, 1, 2]
    assert spans.rows.tolist() == [9, 2, 5]
    assert spans.is_step
    assert spans.position_of.tolist() == [7, 0, 3]
