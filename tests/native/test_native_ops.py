"""Each op of the native library against its torch twin, or the same sum in float64, within stated tolerances."""

from __future__ import annotations

import ctypes
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import NativeSampler, RowSampling, Sampler
from hnet_runtime.ops.activation import softplus
from hnet_runtime.ops.attention import KeyGrid, attend
from hnet_runtime.ops.conv import causal_conv
from hnet_runtime.ops.native import binding
from hnet_runtime.ops.native.packing import pack, quantize
from hnet_runtime.ops.norm import gated_rms_norm, rms_norm
from hnet_runtime.ops.rotary import rotary_table, rotate
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.ssm import selective_scan
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
EPS = 2.0**-24  # half a unit in the last place of 1
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 91, 130]


def units(found: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place of the exact value (float64)."""
    magnitude = exact.float().abs().clamp(min=torch.finfo(torch.float32).tiny)
    unit = (torch.nextafter(magnitude, torch.tensor(INF)) - magnitude).double()
    return float(((found.double() - exact).abs() / unit).max())


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of the largest expected magnitude."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert float((found.double() - expected.double()).abs().max()) <= relative * float(expected.abs().max())


def spans_of(row: int, start: int, length: int) -> Spans:
    return Spans.of([row], [start], [length], CPU)[0]


# ── element by element ────────────────────────────────────────────────────────────────────────


def test_exp_is_within_one_unit_of_the_truth_over_its_whole_range(ops):
    x = torch.cat((torch.linspace(-87.33, 88.0, 400_001), torch.linspace(-1.0, 1.0, 200_001)))
    assert units(ops.each("exp", x), torch.exp(x.double())) <= 1.0


def test_exp_of_what_is_no_ordinary_number(ops):
    x = torch.tensor([NAN, -INF, -1e30, -100.0, -87.34, 0.0, -0.0, 1e-40, -1e-40])
    found = ops.each("exp", x)
    assert found[0].isnan()
    assert found[1:5].tolist() == [0.0] * 4  # the softmax of a key that is not there
    assert found[5:].tolist() == [1.0] * 4
    assert (ops.each("exp", torch.tensor([88.0, 89.0, 1e30, INF])) >= 1e38).all()


def test_silu_is_within_three_units_of_the_truth(ops):
    x = torch.cat((torch.linspace(-87.0, 87.0, 400_001), torch.linspace(-1.0, 1.0, 100_001)))
    assert units(ops.each("silu", x), x.double() / (1 + torch.exp(-x.double()))) <= 3.0


def test_silu_of_what_is_no_ordinary_number(ops):
    x = torch.tensor([NAN, INF, 1e30, 0.0, -90.0, -200.0, -1e9])
    found = ops.each("silu", x)
    assert found[0].isnan()
    assert found[1:4].tolist() == [INF, x[2], 0.0]
    assert (found[4:].abs() < 1e-28).all()
    assert not ops.each("silu", torch.tensor([-INF])).isfinite()


def test_softplus_is_within_two_units_of_its_twin(ops):
    x = torch.cat((torch.linspace(-85.0, 40.0, 300_001), torch.tensor([20.0, 20.000002, 19.999998])))
    assert units(ops.each("softplus", x), softplus(x).double()) <= 2.0
    odd = ops.each("softplus", torch.tensor([NAN, INF, -INF, 1e30, 20.5]))
    assert odd[0].isnan()
    assert odd[1:].tolist() == [INF, 0.0, torch.tensor(1e30), 20.5]


@pytest.mark.parametrize("name", ["exp", "silu"])
def test_an_element_has_the_same_bits_wherever_it_stands(ops, noise, name):
    x = 5 * noise(67)
    alone = torch.cat([ops.each(name, x[i : i + 1]) for i in range(len(x))])
    for begin in range(20):
        assert torch.equal(ops.each(name, x[begin:].clone()), alone[begin:])


def test_bfloat16_rounds_like_torch_for_every_pattern_around_every_tie(ops):
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (high | low).view(torch.float32)
        found, expected = ops.each("to_bf16", x), x.to(torch.bfloat16).view(torch.int16)
        number = ~x.isnan()
        assert torch.equal(found[number], expected[number])
        assert found[~number].view(torch.bfloat16).isnan().all()


def test_every_bfloat16_comes_back_as_itself(ops):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    assert torch.equal(ops.each("from_bf16", bits).view(torch.int32), bits.int() << 16)


# ── norms ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [*SIZES, 1000, 1536])
def test_rms_norm_is_its_twin_within_4e7(ops, noise, n):
    x, weight = 3 * noise(5, n), 1 + 0.2 * noise(n, seed=1)
    assert_close(ops.rms_norm(x, weight), rms_norm(x.double(), weight.double()), 4e-7)
    assert_close(ops.rms_norm(x, weight), rms_norm(x, weight), 4e-7)


def test_rms_norm_of_zeros_is_zeros_and_of_nan_spoils_its_own_row(ops, noise):
    x = noise(4, 37)
    expected = ops.rms_norm(x[2:3].clone(), torch.ones(37))
    x[0], x[1, 36] = 0.0, NAN
    found = ops.rms_norm(x, torch.ones(37))
    assert torch.equal(found[0], torch.zeros(37))
    assert found[1].isnan().all()
    assert torch.equal(found[2:3], expected)


@pytest.mark.parametrize("n", [64, 128, 192, 1024])
def test_gated_rms_norm_is_its_twin_within_1e6(ops, noise, n):
    y, gate, weight = 2 * noise(6, n), 4 * noise(6, n, seed=1), 1 + 0.2 * noise(n, seed=2)
    assert_close(ops.gated_rms_norm(y, gate, weight), gated_rms_norm(y, gate, weight), 1e-6)


# ── convolution and recurrence ────────────────────────────────────────────────────────────────

CUTS = [[40], [1] * 40, [7, 1, 1, 20, 2, 9], [2, 38], [39, 1]]


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 5, 16, 33, 96, 300])
def test_a_convolution_in_pieces_carries_what_its_twin_carries(ops, noise, taps, channels):
    x, weight, bias = noise(40, channels), noise(taps, channels, seed=1), noise(channels, seed=2)
    began = noise(taps - 1, channels, seed=3)  # as if others had gone before
    arena = torch.stack((torch.zeros_like(began), began.clone()))
    expected = causal_conv(x, arena, spans_of(1, 0, 40), weight, bias)
    heard = []
    for cut in CUTS:
        state, at, parts = began.clone(), 0, []
        for length in cut:
            parts.append(ops.causal_conv(x[at : at + length].clone(), state, weight, bias))
            at += length
        heard.append(torch.cat(parts))
        assert_close(heard[-1], expected, 1e-6)
        assert torch.equal(state, arena[1])
        assert torch.equal(heard[-1], heard[0])


def test_a_convolution_of_some_channels_at_a_time_is_that_of_all(ops, noise):
    x, weight, bias = noise(9, 300), noise(4, 300, seed=1), noise(300, seed=2)
    whole_state, state = noise(3, 300, seed=3), noise(3, 300, seed=3)
    whole = ops.causal_conv(x, whole_state, weight, bias)
    for part in (ops.lanes, 64, 256):
        again = state.clone()
        assert torch.equal(ops.causal_conv(x, again, weight, bias, part), whole)
        assert torch.equal(again, whole_state)


@pytest.mark.parametrize("states", [1, 5, 16, 24, 32, 48, 128])
def test_a_recurrence_in_pieces_carries_what_its_twin_carries(ops, noise, states):
    heads, length = 3, 40
    x, dt, bc = noise(length, heads, 64), noise(length, heads, seed=1), noise(length, 2 * states, seed=2)
    a, d, dt_bias = -torch.exp(noise(heads, seed=3)), noise(heads, seed=4), noise(heads, seed=5)
    began = noise(heads, 64, states, seed=6)
    arena = torch.stack((torch.zeros_like(began), began.clone()))
    b, c = bc.split(states, -1)
    expected = selective_scan(x, softplus(dt + dt_bias), a, b, c, d, arena, spans_of(1, 0, length))
    heard = []
    for cut in CUTS:
        state, at, parts = began.clone(), 0, []
        for piece in cut:
            here = slice(at, at + piece)
            parts.append(ops.selective_scan(x[here].clone(), dt[here].clone(), bc[here].clone(), a, d, dt_bias, state))
            at += piece
        heard.append((torch.cat(parts), state))
    assert_close(heard[0][0], expected, 2e-6)
    assert_close(heard[0][1], arena[1], 2e-6)
    for y, state in heard[1:]:
        assert torch.equal(y, heard[0][0])
        assert torch.equal(state, heard[0][1])


# ── rotary and attention ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rotary_dim", [2, 6, 16, 20, 64])
def test_rotation_has_the_bits_of_its_twin(ops, noise, rotary_dim):
    x = noise(5, 2, 64)
    cos, sin = rotary_table(torch.tensor([0, 1, 63, 1000, 8191]), rotary_dim)
    expected = rotate(x, (cos, sin))
    for t in range(5):
        for head in range(2):
            assert torch.equal(
                ops.rotate(x[t, head], cos[t, 0].contiguous(), sin[t, 0].contiguous()), expected[t, head]
            )


LENGTH = 150
WINDOWS = [-1, 0, 1, 15, 63, 64, 100]


def stores(heads: int, head_dim: int, window: int, dtype: torch.dtype):
    """Slots of row 2 as the library and as the twin find them, and two pairs of stores full of NaN."""
    if window >= 0:
        ring = RingSlots(window + 1)
        slots, twin, capacity, count = binding.Slots(capacity=window + 1), ring.slots, window + 1, 4 * (window + 1)
    else:
        pool = PagePool(num_rows=4, num_pages=10, max_positions=200)
        for row in (1, 2, 3):
            pool.reserve(row, 130 if row != 2 else 200)
        slots = binding.Slots(table=pool.table.ctypes.data, row_pages=pool.table.shape[1])
        slots.keep = pool
        twin, capacity, count = pool.slots, None, 11 * PAGE
    kept = [torch.full((count, heads, head_dim), NAN, dtype=dtype) for _ in range(4)]
    return slots, twin, capacity, kept


def twin_attention(q: Tensor, k: Tensor, v: Tensor, window: int, twin, capacity, k_store: Tensor, v_store: Tensor):
    grid = KeyGrid(spans_of(2, 0, len(q)), window, twin, capacity)
    return attend(q, k.to(k_store.dtype), v.to(v_store.dtype), k_store, v_store, grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("head_dim", [4, 13, 15, 16, 21, 32, 64, 80])
def test_attention_in_pieces_is_its_twin_over_rings_and_pages(ops, noise, head_dim, window, dtype):
    heads = 2
    qkv = 1.5 * noise(LENGTH, 3, heads, head_dim)
    slots, twin, capacity, (k_twin, v_twin, keys, values) = stores(heads, head_dim, window, dtype)
    expected = twin_attention(*qkv.unbind(1), window, twin, capacity, k_twin, v_twin)
    heard = []
    for cut in ([LENGTH], [1] * LENGTH, [63, 1, 1, 1, 70, 14]):
        keys.fill_(NAN)
        values.fill_(NAN)
        at, parts = 0, []
        for piece in cut:
            parts.append(ops.attend(qkv[at : at + piece], 2, at, window, slots, keys, values))
            at += piece
        heard.append(torch.cat(parts))
        for found, truth in ((keys, k_twin), (values, v_twin)):
            assert torch.equal(found.isnan(), truth.isnan())  # the same slots were written, and no others
            assert torch.equal(found.nan_to_num(), truth.nan_to_num())
    assert_close(heard[0], expected, 2e-6)
    for other in heard[1:]:
        assert torch.equal(other, heard[0])


def test_attention_over_one_key_gives_its_value(ops, noise):
    qkv = noise(3, 3, 1, 32)
    slots, _, _, (_, _, keys, values) = stores(1, 32, 0, torch.float32)
    assert torch.equal(ops.attend(qkv, 2, 0, 0, slots, keys, values), qkv[:, 2])


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_attention_to_scores_of_any_size_stays_finite(ops, noise, scale):
    qkv = noise(LENGTH, 3, 2, 16)
    qkv[:, :2] *= scale
    slots, twin, capacity, (k_twin, v_twin, keys, values) = stores(2, 16, -1, torch.float32)
    expected = twin_attention(*qkv.unbind(1), -1, twin, capacity, k_twin, v_twin)
    found = ops.attend(qkv, 2, 0, -1, slots, keys, values)
    assert found.isfinite().all()
    if scale < 100:  # beyond, the score's own rounding decides between keys
        assert_close(found, expected, 2e-3)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_query_that_is_not_finite_spoils_itself_alone(ops, noise, value):
    qkv = noise(20, 3, 1, 16)
    slots, _, _, (_, _, keys, values) = stores(1, 16, -1, torch.float32)
    expected = ops.attend(qkv, 2, 0, -1, slots, keys, values)
    qkv[7, 0, 0, 3] = value
    found = ops.attend(qkv, 2, 0, -1, slots, keys, values)
    assert found[7].isnan().all()
    clean = [t for t in range(20) if t != 7]
    assert torch.equal(found[clean], expected[clean])


def test_a_key_that_is_nan_spoils_every_query_that_sees_it(ops, noise):
    qkv = noise(20, 3, 1, 16)
    qkv[7, 1, 0, 3] = NAN
    slots, _, _, (_, _, keys, values) = stores(1, 16, 4, torch.float32)
    spoilt = ops.attend(qkv, 2, 0, 4, slots, keys, values).isnan().all(-1).flatten()
    assert spoilt.nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


# ── matrix products ───────────────────────────────────────────────────────────────────────────

SHAPES = [(1, 1), (3, 5), (16, 4), (17, 33), (33, 17), (64, 63), (65, 64), (130, 91), (257, 30)]  # N, K


def bound(x: Tensor, weight: Tensor, bias: Tensor | float, parts: bool) -> Tensor:
    """The most that K sums in float32, in order, may be off: K + 3 roundings of what is at most Σ |x||w| + |b|.

    parts: activations in two bfloat16 parts of 8 bits each, which hold them to 2⁻¹⁶.
    """
    largest = x.double().abs() @ weight.double().abs().t() + abs(bias)
    return ((x.shape[1] + 3) * EPS + (2.0**-16 if parts else 0.0)) * largest + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_product_is_the_float64_one_within_its_roundings(ops, noise, n, k, dtype):
    weight, bias = noise(n, k).to(dtype), noise(n, seed=1)
    parts = dtype is torch.bfloat16 and ops.calls.hnet_word_multiple(binding.BFLOAT16) > 1  # AMX
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 40):
        x, onto = noise(rows, k, seed=2), noise(rows, n, seed=3)
        exact = x.double() @ weight.double().t()
        plain = ops.product(pack(weight, ops.calls), x, spare=2)
        assert ((plain - exact).abs() <= bound(x, weight, 0.0, parts)).all()
        biased = ops.product(pack(weight, ops.calls, bias), x, spare=2, stride=k + 3)
        assert ((biased - (exact + bias)).abs() <= bound(x, weight, bias, parts)).all()
        added = ops.product(pack(weight, ops.calls, bias), x, onto=onto, spare=2)
        assert torch.equal(added, onto + biased)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_an_8_bit_product_is_exact_but_for_its_scales(ops, noise, n, k):
    weight = noise(n, k)
    packed = quantize(weight, ops.calls)
    scale = weight.abs().amax(1) / 127.0
    numbers = torch.round(weight / scale.unsqueeze(1)).long()
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 40):
        x, onto = noise(rows, k, seed=2) * torch.logspace(-3, 3, rows).unsqueeze(1), noise(rows, n, seed=3)
        q, x_scale = ops.quantize(x)
        counts = (q[:, :k].long() - 128) @ numbers.t()
        expected = counts.float() * (scale * x_scale.unsqueeze(1))
        assert torch.equal(ops.product(packed, x, spare=1), expected)
        assert torch.equal(ops.product(packed, x, onto=onto, stride=k + 1), onto + expected)


def test_an_8_bit_product_does_not_overflow_where_everything_is_largest(ops):
    k = 16384
    for sign in (1.0, -1.0):
        packed = quantize(torch.full((5, k), sign), ops.calls)
        for x in (torch.ones(2, k), -torch.ones(2, k)):
            exact = sign * float(x[0, 0]) * k
            assert_close(ops.product(packed, x), torch.full((2, 5), exact), 1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("n", "k"), [(65, 64), (130, 91), (300, 257)])
def test_a_row_of_a_product_has_the_same_bits_in_any_number_of_rows_and_threads(ops, noise, n, k, kind):
    weight = noise(n, k)
    packed = quantize(weight, ops.calls) if kind == "int8" else pack(weight.to(getattr(torch, kind)), ops.calls)
    x = noise(40, k, seed=1)
    alone = torch.cat([ops.product(packed, x[r : r + 1].clone()) for r in range(40)])
    for rows in range(1, 41):
        assert torch.equal(ops.product(packed, x[:rows].clone()), alone[:rows])
    for threads in (2, 3):
        for rows in (1, 3, 16, 37):
            assert torch.equal(ops.product(packed, x[:rows].clone(), threads=threads), alone[:rows])
    backwards = x.flip(0)
    assert torch.equal(ops.product(packed, backwards).flip(0), alone)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_that_is_not_finite_spoils_no_other(ops, noise, kind, value):
    weight = noise(70, 45)
    packed = quantize(weight, ops.calls) if kind == "int8" else pack(weight.to(getattr(torch, kind)), ops.calls)
    x = noise(21, 45, seed=1)
    expected = ops.product(packed, x)
    for row in (0, 7, 16, 20):
        spoilt = x.clone()
        spoilt[row, 44] = value
        found = ops.product(packed, spoilt)
        assert not found[row].isfinite().any()
        others = [r for r in range(21) if r != row]
        assert torch.equal(found[others], expected[others])


# ── quantisation of activations ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 3, 4, 5, 63, 64, 130])
def test_a_row_of_activations_takes_its_largest_magnitude_as_127(ops, noise, k):
    x = noise(9, k) * torch.logspace(-6, 6, 9).unsqueeze(1)
    q, scale = ops.quantize(x)
    largest = x.abs().amax(1)
    assert torch.equal(scale, largest / 127.0)
    assert torch.equal(q[:, :k].float() - 128, torch.round(x * (127.0 / largest).unsqueeze(1)))
    assert (q[:, k:] == 128).all()
    assert ((q[:, :k].float() - 128).abs().amax(1) == 127).all()
    assert ((x - scale.unsqueeze(1) * (q[:, :k].float() - 128)).abs() <= 0.5001 * scale.unsqueeze(1)).all()


def test_zeros_are_zeros_and_what_is_not_finite_makes_its_own_row_nan(ops, noise):
    x = noise(7, 13)
    x[1] = 0.0
    x[2, 5], x[3, 12], x[4, 0] = NAN, INF, -INF
    x[5] = 1e-39 * torch.sign(x[5])  # too small to have a scale
    q, scale = ops.quantize(x)
    alone = [ops.quantize(x[row : row + 1]) for row in (0, 6)]
    assert scale[1] == 0.0
    assert (q[1] == 128).all()
    assert scale[2:5].isnan().all()
    assert (q[2:6] == 128).all()
    assert scale[5].isfinite()
    for row, (numbers, own) in zip((0, 6), alone, strict=True):
        assert torch.equal(q[row], numbers[0])
        assert scale[row] == own[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_sampler_draws_what_its_twin_draws(library, noise, seed):
    rng = random.Random(seed)
    rows = 64
    logits = 3 * noise(rows, 256, seed=seed)
    logits[::7] = logits[::7].round()  # ties
    masks = len(utf8.mask_table())
    draws = [
        RowSampling(
            SamplingParams(
                temperature=rng.choice([0.0, 1e-3, 0.7, 1.0, 3.0]),
                top_k=rng.choice([0, 0, 1, 5, 100, 256]),
                top_p=rng.choice([1.0, 1.0, 0.1, 0.5, 0.95]),
                min_p=rng.choice([0.0, 0.0, 0.02, 1.0]),
            ),
            rng.randrange(masks),
            rng.choice([0.0, rng.random(), rng.random(), 1.0 - 2.0**-53]),
        )
        for _ in range(rows)
    ]
    logits[5, 17], logits[6, 0], logits[7, 255] = NAN, INF, -INF
    expected = Sampler(CPU).draw(logits, draws)
    found = NativeSampler(library.calls).draw(logits, draws)
    assert found[5:8] == [None, None, None]
    assert found == expected
    assert [NativeSampler(library.calls).draw(logits[r : r + 1], [draws[r]])[0] for r in range(rows)] == found


@pytest.mark.parametrize(
    ("cut", "newest"), [({}, 255), ({"top_p": 0.5}, 127), ({"top_k": 10}, 9), ({"min_p": 1.0}, 255)]
)
def test_the_sampler_cuts_equals_where_its_twin_cuts_them(library, cut, newest):
    """256 equal bytes: what is kept begins with byte 0 and ends before the bound."""
    every = next(row for row, allowed in enumerate(utf8.mask_table()) if allowed.all())
    logits, sampling = torch.zeros(2, 256), SamplingParams(temperature=1.0, **cut)
    draws = [RowSampling(sampling, every, uniform) for uniform in (0.0, 1.0 - 2.0**-53)]
    assert NativeSampler(library.calls).draw(logits, draws) == [0, newest]
    assert Sampler(CPU).draw(logits, draws) == [0, newest]


def test_weights_are_packed_with_nothing_lost(ops, noise):
    for dtype, per_word in ((torch.float32, 1), (torch.bfloat16, 2), (torch.int8, 4)):
        weight = (50 * noise(37, 11)).to(dtype)
        packed = pack(weight, ops.calls)
        unpacked = packed.data.permute(0, 2, 1, 3).reshape(-1, packed.data.shape[1] * per_word)
        assert torch.equal(unpacked[:37, :11], weight)
        assert not unpacked[37:].any()
        assert not unpacked[:, 11:].any()


def test_an_output_without_weights_is_quantised_to_zero(ops, noise):
    weight = noise(20, 9)
    weight[3] = 0.0
    found = ops.product(quantize(weight, ops.calls), noise(2, 9, seed=1))
    assert torch.equal(found[:, 3], torch.zeros(2))
    assert found.isfinite().all()
    assert np.count_nonzero(found) == 38


# ── the interface ─────────────────────────────────────────────────────────────────────────────


def test_structs_have_the_same_size_here_and_there(ops):
    here = [
        binding.Matrix,
        binding.Layer,
        binding.Stack,
        binding.Slots,
        binding.Stage,
        binding.Model,
        binding.Draw,
        binding.StageReport,
    ]
    there = (ctypes.c_int64 * len(here))()
    ops.calls.hnet_struct_sizes(there)
    assert list(there) == [ctypes.sizeof(struct) for struct in here]


def test_a_library_that_lacks_a_call_is_refused_in_one_line(ops, monkeypatch):
    """Older than the sources, though nobody raised the interface's number."""

    class Older:
        hnet_interface = ops.calls.hnet_interface

        def __getattr__(self, name: str):
            raise AttributeError(f"/here/libhnet_old.so: undefined symbol: {name}")

    monkeypatch.setattr(binding.ctypes, "CDLL", lambda path: Older())
    with pytest.raises(binding.NativeError, match=r"^libhnet_old.so: lacks hnet_lanes; build the package again$"):
        binding.load(Path("libhnet_old.so"))
