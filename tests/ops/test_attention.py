"""Attention over pages and rings, against a loop over queries in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnet_runtime.ops import attention
from hnet_runtime.ops.attention import BLOCK, KeyGrid, attend
from hnet_runtime.ops.spans import Spans
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

NUM_ROWS, LENGTH = 5, 200
NAN = float("nan")


@dataclass
class Store:
    """Keys and values of one layer for rows 1…NUM_ROWS − 1, in pages or in rings, as a stage would keep them."""

    window: int
    heads: int
    head_dim: int
    paged: bool
    fill: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.paged:
            pool = PagePool(NUM_ROWS, 4 * (NUM_ROWS + 1), LENGTH)
            for row in (3, 1, 4, 2):
                pool.reserve(row, LENGTH)
            self.slots, self.capacity, count = pool.slots, None, (pool.num_pages + 1) * PAGE
        else:
            ring = RingSlots(self.window + 1)
            self.slots, self.capacity, count = ring.slots, ring.capacity, NUM_ROWS * ring.capacity
        shape = (count, self.heads, self.head_dim)
        self.k, self.v = (torch.full(shape, self.fill, dtype=self.dtype) for _ in range(2))

    def attend(self, spans: Spans, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, self.k, self.v, KeyGrid(spans, self.window, self.slots, self.capacity))


def exact(row: tuple[torch.Tensor, ...], window: int) -> torch.Tensor:
    """[L, H, P] one query and one head at a time."""
    q, k, v = (tensor.double() for tensor in row)
    out = torch.empty_like(q)
    for t in range(len(q)):
        first = 0 if window < 0 else max(0, t - window)
        for h in range(q.shape[1]):
            scores = k[first : t + 1, h] @ q[t, h] / math.sqrt(q.shape[2])
            out[t, h] = torch.softmax(scores, 0) @ v[first : t + 1, h]
    return out


def rows_of(noise, heads: int, head_dim: int, length: int = LENGTH) -> dict[int, tuple[torch.Tensor, ...]]:
    return {row: tuple(noise(length, heads, head_dim, seed=10 * row + i) for i in range(3)) for row in (1, 2, 3)}


STORES = [
    (-1, True),  # all keys, in pages
    (0, False),
    (5, False),
    (62, False),
    (63, False),
    (64, False),
    (130, False),
    (20, True),  # a window in pages: max_positions is small
    (LENGTH + 9, True),
]
SHAPES = [(4, 16), (1, 64), (3, 15), (7, 13), (8, 8)]


@pytest.mark.parametrize(("window", "paged"), STORES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES[:2])
def test_attention_is_exact_and_the_same_in_any_spans_and_company(
    noise, sequences, cuts, window, paged, heads, head_dim
):
    rows = rows_of(noise, heads, head_dim)
    found = []
    for fill, ticks in zip((0.0, NAN, 1e30, NAN, NAN), cuts(LENGTH), strict=True):  # leftovers are never seen
        store = Store(window, heads, head_dim, paged, fill)
        found.append(sequences(rows).run(store.attend, ticks)[2])
    assert torch.allclose(found[0].double(), exact(rows[2], window), rtol=1e-5, atol=1e-5)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("window", "paged"), [(-1, True), (40, False)])
def test_any_heads_and_head_dim_keep_their_bits_in_a_crowd(noise, sequences, cuts, heads, head_dim, window, paged):
    rows = rows_of(noise, heads, head_dim, 150)
    whole, *others = (
        sequences(rows).run(Store(window, heads, head_dim, paged).attend, ticks)[2] for ticks in cuts(150)
    )
    assert torch.allclose(whole.double(), exact(rows[2], window), rtol=1e-5, atol=1e-5)
    for other in others:
        assert torch.equal(other, whole)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_keep_every_row_independent_of_its_company(noise, sequences, cuts, threads, count):
    threads(count)
    rows = rows_of(noise, 6, 32, 100)
    whole, *others = (sequences(rows).run(Store(-1, 6, 32, True).attend, ticks)[2] for ticks in cuts(100))
    for other in others:
        assert torch.equal(other, whole)


@pytest.mark.parametrize("first", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("second", [1, 2, BLOCK])
@pytest.mark.parametrize(("window", "paged"), [(-1, True), (63, False), (64, False), (3, False)])
def test_cuts_at_block_borders_change_nothing(noise, sequences, first, second, window, paged):
    rows = {2: rows_of(noise, 2, 8)[2]}
    whole = sequences(rows).run(Store(window, 2, 8, paged).attend, [{2: LENGTH}])[2]
    ticks = [{2: first}, {2: second}]
    if first + second < LENGTH:
        ticks.append({2: LENGTH - first - second})
    assert torch.equal(sequences(rows).run(Store(window, 2, 8, paged, NAN).attend, ticks)[2], whole)


@pytest.mark.parametrize("window", [0, 1, 3, 10])
def test_a_span_longer_than_the_ring_reads_and_leaves_the_right_keys(noise, sequences, window):
    rows = rows_of(noise, 2, 8)
    store = Store(window, 2, 8, paged=False, fill=NAN)
    found = sequences(rows).run(store.attend, [{2: 5, 1: 60}, {1: 90, 2: 150}, {2: 1}, {2: 44, 1: 1}])
    assert torch.allclose(found[2].double(), exact(rows[2], window), rtol=1e-5, atol=1e-5)
    for row, length in ((1, 151), (2, 200)):
        for position in range(length - window - 1, length):  # the ring holds the last window + 1 positions
            slot = int(store.slots(np.array([[row]]), np.array([[position]]))[0, 0])
            assert torch.equal(store.k[slot], rows[row][1][position])
            assert torch.equal(store.v[slot], rows[row][2][position])


@pytest.mark.parametrize("floats", [1, 3 * 200 * 16, 40 * 200 * 16])
@pytest.mark.parametrize(("window", "paged"), [(-1, True), (30, False)])
def test_queries_taken_a_few_at_a_time_give_the_same_bits(noise, sequences, cuts, monkeypatch, floats, window, paged):
    rows = rows_of(noise, 2, 8)
    at_once = [sequences(rows).run(Store(window, 2, 8, paged).attend, ticks) for ticks in cuts(LENGTH)]
    monkeypatch.setattr(attention, "_CHUNK_FLOATS", floats)
    for ticks, expected in zip(cuts(LENGTH), at_once, strict=True):
        found = sequences(rows).run(Store(window, 2, 8, paged).attend, ticks)
        for row in expected:
            assert torch.equal(found[row], expected[row])


@pytest.mark.parametrize(("window", "paged"), [(-1, True), (9, False)])
def test_what_is_not_finite_in_one_row_spoils_no_other(noise, sequences, window, paged):
    rows = rows_of(noise, 2, 8)
    ticks = [{1: 30, 2: 70, 3: 5}, {2: 1, 1: 1, 3: 1}, {3: 60, 2: 9, 1: 100}]
    clean = sequences(rows).run(Store(window, 2, 8, paged).attend, ticks)
    spoiled = {**rows, 1: tuple(torch.full_like(tensor, NAN) for tensor in rows[1])}
    found = sequences(spoiled).run(Store(window, 2, 8, paged).attend, ticks)
    assert found[1].isnan().all()
    for row in (2, 3):
        assert torch.equal(found[row], clean[row])


def test_huge_scores_do_not_overflow(noise, sequences):
    rows = {1: tuple(tensor * scale for tensor, scale in zip(rows_of(noise, 2, 8)[1], (1e10, 1e10, 1), strict=True))}
    found = sequences(rows).run(Store(-1, 2, 8, paged=True).attend, [{1: 70}])[1]
    assert found.isfinite().all()
    assert torch.allclose(found[0], rows[1][2][0])  # alone it is its own average


def test_bfloat16_is_summed_in_float32(noise, sequences):
    rows = {2: tuple(tensor.bfloat16() for tensor in rows_of(noise, 2, 16)[2])}
    store = Store(-1, 2, 16, paged=True, dtype=torch.bfloat16)
    found = sequences(rows).run(store.attend, [{2: 90}, {2: 30}])[2]
    assert found.dtype == torch.bfloat16
    truth = exact(rows[2], -1)[:120]
    assert ((found.double() - truth).abs() <= 2.0**-8 * truth.abs() + 1e-5).all()


TICKS = st.lists(st.dictionaries(st.integers(1, 3), st.integers(1, 75), min_size=1, max_size=3), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ticks=TICKS, window=st.sampled_from([-1, 0, 1, 7, 63, 64, 100]))
def test_any_schedule_gives_every_query_its_bits(noise, sequences, ticks, window):
    rows = rows_of(noise, 2, 8)
    position = dict.fromkeys(rows, 0)
    fitting = []
    for tick in ticks:
        pieces = {row: min(size, LENGTH - position[row]) for row, size in tick.items()}
        pieces = {row: size for row, size in pieces.items() if size}
        for row, size in pieces.items():
            position[row] += size
        if pieces:
            fitting.append(pieces)
    found = sequences(rows).run(Store(window, 2, 8, window < 0, NAN).attend, fitting)
    for row, values in found.items():
        alone = sequences({row: rows[row]}).run(Store(window, 2, 8, window < 0).attend, [{row: LENGTH}])[row]
        assert torch.equal(values, alone[: len(values)])
