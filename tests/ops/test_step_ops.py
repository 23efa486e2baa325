"""The ops of a captured step against those over spans: the same bits, beside padding rows too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import RowSampling, Sampler
from hnet_runtime.ops.activation import softplus
from hnet_runtime.ops.attention import BLOCK, KeyGrid, attend, blocks_seen, decode_attention, rotate_and_keep
from hnet_runtime.ops.compaction import compact
from hnet_runtime.ops.conv import causal_conv, conv_step
from hnet_runtime.ops.ema import ema_kept, ema_step, smooth
from hnet_runtime.ops.norm import add_rms_norm, gated_norm_step, gated_rms_norm, rms_norm
from hnet_runtime.ops.places import last_places, next_places
from hnet_runtime.ops.rotary import rotary_table, rotate
from hnet_runtime.ops.router import boundary_probability, router_step
from hnet_runtime.ops.sampling import NOT_FINITE, sample_step
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.ssm import selective_scan, ssm_step
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

CPU = torch.device("cpu")
NUM_ROWS = 9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Rows of a step, and the bucket they are padded to.
ROWS = pytest.mark.parametrize(
    ("rows", "bucket"), [([3], 1), ([3], 4), ([5, 2, 7], 4), ([1, 2, 3, 4, 8], 8), ([8, 1, 6, 2], 32)]
)


def padded(rows: list[int], bucket: int) -> Tensor:
    return torch.tensor([*rows, *[0] * (bucket - len(rows))])


def spans_of(rows: list[int], starts: list[int] | None = None) -> Spans:
    return Spans.of(rows, starts or [1] * len(rows), [1] * len(rows), CPU)[0]


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def same_rows(found: Tensor, expected: Tensor) -> None:
    """Arenas are the same but for the padding row, which belongs to nobody."""
    same(found[1:], expected[1:])


@DTYPES
@pytest.mark.parametrize("width", [8, 100, 1024])
def test_add_rms_norm_is_the_blocks_addition_and_norm(noise, dtype, width):
    h, residual, weight = noise(5, width).to(dtype), noise(5, width, seed=1), noise(width, seed=2)
    expected = residual + h.float()
    same(add_rms_norm(h, residual, weight, False), rms_norm(expected, weight).to(dtype))
    same(residual, expected)


@DTYPES
def test_add_rms_norm_begins_a_residual_stream_whatever_its_memory_holds(noise, dtype):
    h, residual, weight = noise(5, 100).to(dtype), torch.full((5, 100), float("nan")), noise(100, seed=2)
    same(add_rms_norm(h, residual, weight, True), rms_norm(h.float(), weight).to(dtype))
    same(residual, h.float())


@DTYPES
def test_gated_norm_step_takes_a_view_of_the_projection(noise, dtype):
    projected, y, weight = noise(5, 300).to(dtype), noise(5, 96, seed=1).to(dtype), noise(96, seed=2)
    gate = projected[:, :96]
    same(gated_norm_step(y, gate, weight), gated_rms_norm(y.float(), gate.float(), weight).to(dtype))


@DTYPES
@ROWS
@pytest.mark.parametrize("depth", [1, 3])
def test_conv_step_is_the_convolution_of_one_position(noise, dtype, rows, bucket, depth):
    width = 20
    state = noise(NUM_ROWS, depth, width).to(dtype)
    weight, bias = noise(depth + 1, width, seed=1), noise(width, seed=2)
    expected_state = state.clone()
    for tick in range(5):
        x = noise(bucket, 50, seed=10 + tick).to(dtype)[:, 7 : 7 + width]
        found = conv_step(x, state, padded(rows, bucket), weight, bias)
        expected = causal_conv(x[: len(rows)], expected_state, spans_of(rows), weight, bias).to(dtype)
        same(found[: len(rows)], expected)
        same_rows(state, expected_state)


@DTYPES
@ROWS
@pytest.mark.parametrize(("heads", "head_dim", "states"), [(3, 5, 7), (4, 16, 32), (2, 64, 128)])
def test_ssm_step_is_the_scan_of_one_position(noise, dtype, rows, bucket, heads, head_dim, states):
    inner = heads * head_dim
    state = noise(NUM_ROWS, heads, head_dim, states)
    a, dt_bias, d = -torch.exp(noise(heads, seed=1)), noise(heads, seed=2), noise(heads, seed=3)
    expected_state = state.clone()
    count = len(rows)
    for tick in range(3):
        projected = noise(bucket, inner + 2 * states + heads, seed=10 + tick).to(dtype)
        xbc, dt = projected[:, : inner + 2 * states], projected[:, inner + 2 * states :]
        found = ssm_step(xbc, dt, a, dt_bias, d, state, padded(rows, bucket))
        x, b, c = torch.split(xbc[:count].float(), [inner, states, states], dim=-1)
        expected = selective_scan(
            x.reshape(count, heads, head_dim),
            softplus(dt[:count].float() + dt_bias),
            a,
            b,
            c,
            d,
            expected_state,
            spans_of(rows),
        )
        same(found[:count], expected.reshape(count, inner).to(dtype))
        same_rows(state, expected_state)


class Keys:
    """Where four rows of a layer keep their keys: in pages out of order, or in rings."""

    def __init__(self, window: int, paged: bool, length: int) -> None:
        self.table, self.capacity = None, None
        if paged:
            pool = PagePool(NUM_ROWS, 64, length)
            for row in (7, 3, 1, 5):
                pool.reserve(row, length)
            self.slots, self.count = pool.slots, (pool.num_pages + 1) * PAGE
            self.table = torch.from_numpy(pool.table)
        else:
            self.capacity = window + 1
            self.slots, self.count = RingSlots(self.capacity).slots, NUM_ROWS * self.capacity

    def slots_of(self, rows: list[int], positions: list[int]) -> list[int]:
        return self.slots(np.array(rows)[:, None], np.array(positions)[:, None])[:, 0].tolist()


@DTYPES
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(2, 8, 8), (3, 15, 6), (4, 64, 32), (2, 16, 0)])
@pytest.mark.parametrize(
    ("window", "paged"),
    [(-1, True), (70, True), (500, True), (0, False), (5, False), (63, False), (64, False), (130, False)],
)
def test_a_query_is_turned_kept_and_answered_as_over_spans(noise, dtype, heads, head_dim, rotary_dim, window, paged):
    length, rows, bucket = 200, [3, 7, 1, 5], 6
    keys = Keys(window, paged, length)
    stores = [noise(keys.count, heads, head_dim, seed=seed).to(dtype) for seed in (1, 2)]
    stores[0][:BLOCK].fill_(float("nan"))  # what the padding row and unused places hold is never seen
    expected_stores = [store.clone() for store in stores]
    for tick, positions in enumerate([[0, 63, 64, 127], [1, 64, 65, 128], [199, 130, 0, 5], [150, 131, 1, 6]]):
        qkv = noise(bucket, 3, heads, head_dim, seed=10 + tick).to(dtype)
        places = torch.tensor([*keys.slots_of(rows, positions), 0, 0])
        at = torch.tensor([*positions, 0, 0])
        q = rotate_and_keep(qkv, at, places, stores[0], stores[1], rotary_dim)
        found = decode_attention(
            q, stores[0], stores[1], padded(rows, bucket), at, keys.table, window, keys.capacity, length
        )
        spans = spans_of(rows, positions)
        own_q, own_k, own_v = qkv[:4].unbind(1)
        if rotary_dim:
            turned = rotary_table(at[:4], rotary_dim)
            own_q, own_k = rotate(own_q, turned), rotate(own_k, turned)
        grid = KeyGrid(spans, window, keys.slots, keys.capacity)
        expected = attend(own_q, own_k, own_v, *expected_stores, grid)
        same(q[:4], own_q)
        assert torch.equal(found[:4], expected) or torch.equal(found[:4].isnan(), expected.isnan())
        own_places = spans.tensor(keys.slots(spans.rows[:, None], spans.position_of[:, None])[:, 0])
        for store, expected_store in zip(stores, expected_stores, strict=True):
            same(store[own_places], expected_store[own_places])


@pytest.mark.parametrize("window", [0, 1, 62, 63, 64, 65, 127, 128, 129, 1023, -1])
@pytest.mark.parametrize("max_positions", [1, 64, 65, 1000])
def test_blocks_seen_is_the_most_that_any_query_needs(window, max_positions):
    newest = np.arange(max_positions)
    oldest = np.maximum(newest - window, 0) if window >= 0 else np.zeros_like(newest)
    assert blocks_seen(window, max_positions) == (newest // BLOCK - oldest // BLOCK).max() + 1


@DTYPES
@ROWS
@pytest.mark.parametrize("width", [8, 100])
def test_router_step_is_the_verdict_on_one_position(noise, dtype, rows, bucket, width):
    memory, q_weight, k_weight = (
        noise(NUM_ROWS, width).to(dtype),
        noise(width, width, seed=1),
        noise(width, width, seed=2),
    )
    expected_memory = memory.clone()
    count = len(rows)
    for tick in range(3):
        starts = [(tick + row) % 3 for row in rows]
        h = noise(bucket, width, seed=10 + tick).to(dtype)
        found = router_step(h, memory, padded(rows, bucket), padded(starts, bucket), q_weight, k_weight)
        same(
            found[:count],
            boundary_probability(h[:count], expected_memory, spans_of(rows, starts), q_weight, k_weight),
        )
        same_rows(memory, expected_memory)


@DTYPES
@pytest.mark.parametrize("opened", [[], [0], [1, 3], [0, 1, 2, 3]])
def test_ema_step_smooths_the_rows_that_opened_a_chunk_and_no_other(noise, dtype, opened):
    rows, width, bucket = [5, 2, 7, 1], 12, 6
    memory = noise(NUM_ROWS, width)
    expected_memory = memory.clone()
    z = noise(bucket, width + 4, seed=1).to(dtype)
    z[len(opened) :] = float("nan")  # past the chunks' places: what a row that opened none must not take up
    is_open, place = torch.zeros(bucket, dtype=torch.bool), torch.full((bucket,), bucket - 1)
    for index, row in enumerate(opened):
        is_open[row], place[row] = True, index
    p = torch.tensor([0.7, 1.0, 0.50001, 0.9, float("nan"), 0.3])
    p[[row for row in range(4) if row not in opened]] = float("nan")
    residual = noise(bucket, width, seed=2)
    found = ema_step(z, place, p, is_open, memory, padded(rows, bucket), residual)
    expected = expected_memory[rows]
    if opened:
        chunks = spans_of([rows[row] for row in opened])
        expected[opened] = smooth(z[: len(opened), :width], p[opened], expected_memory, chunks)
    same(found[:4], (expected + residual[:4]).to(dtype))
    same_rows(memory, expected_memory)
    if not opened:
        same(ema_kept(memory, padded(rows, bucket), residual, dtype)[:4], found[:4])


class Kept:
    """Where a stage keeps keys, as `Keys`; or nowhere."""

    def __init__(self, kind: str) -> None:
        keys = None if kind == "nowhere" else Keys(5, kind == "pages", 200)
        self.table, self.capacity = (None, None) if keys is None else (keys.table, keys.capacity)
        self.slots_of = (lambda rows, positions: [0] * len(rows)) if keys is None else keys.slots_of


@pytest.mark.parametrize("kind", ["pages", "ring", "nowhere"])
def test_places_are_counted_but_for_padding(kind):
    kept = Kept(kind)
    rows, starts = [3, 7, 5], [0, 63, 130]
    positions = torch.full((NUM_ROWS,), 9)
    positions[0], positions[rows] = 0, torch.tensor(starts)
    for tick in range(3):
        given = padded(rows, 5)
        at, slots = next_places(given, positions, kept.table, kept.capacity)
        now = [start + tick for start in starts]
        assert at.tolist() == [*now, 0, 0]
        assert slots[:3].tolist() == kept.slots_of(rows, now)
        assert slots[3:].tolist() == [0, 0]
        last, where = last_places(given, positions, kept.table, kept.capacity)
        same(last, at)
        same(where, slots)
    assert positions[rows].tolist() == [start + 3 for start in starts]
    assert (positions[0], positions[1]) == (0, 9)


@pytest.mark.parametrize("bucket", [1, 2, 8, 33])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_compact_puts_the_chosen_rows_first_and_padding_after_them(bucket, share):
    generator = torch.Generator().manual_seed(bucket)
    chosen = torch.rand(bucket, generator=generator) < share
    rows = torch.randperm(bucket, generator=generator) + 1
    places, inner_rows, slot, count = compact(chosen, rows)
    wanted = chosen.nonzero().flatten().tolist()
    rest = [0] * (bucket - len(wanted))
    assert count.tolist() == [len(wanted)]
    assert places.tolist() == wanted + rest
    assert inner_rows.tolist() == rows[wanted].tolist() + rest
    assert slot.tolist() == [wanted.index(i) if i in wanted else 0 for i in range(bucket)]
    assert {each.dtype for each in (places, inner_rows, slot, count)} == {torch.int64}


def params_of(seed: int, count: int) -> list[SamplingParams]:
    draw = np.random.default_rng(seed)
    return [
        SamplingParams(
            temperature=float(draw.choice([0.0, 1e-300, 0.3, 1.0, 2.0])),
            top_p=float(draw.choice([1.0, 0.9, 0.5, 1e-9])),
            top_k=int(draw.choice([0, 1, 3, 40, 256])),
            min_p=float(draw.choice([0.0, 0.0, 0.05, 1.0])),
        )
        for _ in range(count)
    ]


def columns(params: list[SamplingParams]) -> dict[str, Tensor]:
    wide = {"temperature", "top_p", "min_p"}
    found = {name: torch.tensor([getattr(each, name) for each in params], dtype=torch.float64) for name in wide}
    return {**found, "top_k": torch.tensor([each.top_k for each in params])}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("coarse", [False, True], ids=["logits", "ties"])
def test_sample_step_draws_the_samplers_bytes(noise, seed, coarse):
    count = 16
    logits = noise(count, 256, seed=seed) * 4
    if coarse:
        logits = logits.round()
    draw = np.random.default_rng(seed)
    allowed = torch.from_numpy(draw.random((count, 256)) < draw.choice([0.02, 0.5, 1.0]))
    allowed[:, 7] = True
    uniform = draw.random(count)
    uniform[:3] = 0.0, 0.5, np.nextafter(1.0, 0.0)
    params = params_of(seed, count)
    rows = [RowSampling(p, 0, float(u), mask.numpy()) for p, u, mask in zip(params, uniform, allowed, strict=True)]
    expected = Sampler(CPU).sample(logits, rows)
    found = sample_step(logits, allowed, uniform=torch.from_numpy(uniform), **columns(params))
    same(found, expected)
    assert allowed.gather(1, found[:, None]).all()


def test_a_row_that_is_not_finite_gets_no_byte_and_spoils_no_other(noise):
    logits, allowed, params = noise(4, 256), torch.ones(4, 256, dtype=torch.bool), params_of(1, 4)
    uniform = torch.full((4,), 0.4, dtype=torch.float64)
    expected = sample_step(logits, allowed, uniform=uniform, **columns(params))
    for value in (float("nan"), float("inf"), float("-inf")):
        spoiled = logits.clone()
        spoiled[1, 9] = value
        expected[1] = NOT_FINITE
        same(sample_step(spoiled, allowed, uniform=uniform, **columns(params)), expected)
