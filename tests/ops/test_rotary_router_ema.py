"""Rotary positions, the router's probability and the moving average, each against a formula of its own."""

from __future__ import annotations

import math

import pytest
import torch

from hnet_runtime.ops.ema import smooth
from hnet_runtime.ops.rotary import rotary_table, rotate
from hnet_runtime.ops.router import boundary_probability
from hnet_runtime.ops.spans import Spans

CPU = torch.device("cpu")


# ── rotary ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rotary_dim", [2, 6, 16, 20])
def test_channels_turn_in_halves_by_their_absolute_position(noise, rotary_dim):
    positions = torch.tensor([0, 1, 63, 64, 8191])
    x = noise(5, 3, 20)
    found = rotate(x, rotary_table(positions, rotary_dim))
    half = rotary_dim // 2
    for t, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / rotary_dim)
            first, second = x[t, :, i].double(), x[t, :, i + half].double()
            turned = first * math.cos(angle) - second * math.sin(angle)
            beside = first * math.sin(angle) + second * math.cos(angle)
            # An angle in fp32 carries an error of its own size's rounding.
            assert torch.allclose(found[t, :, i].double(), turned, rtol=0, atol=1e-5 + 1e-6 * position)
            assert torch.allclose(found[t, :, i + half].double(), beside, rtol=0, atol=1e-5 + 1e-6 * position)
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


def test_products_of_turned_vectors_depend_on_distance_alone(noise):
    q, k = noise(1, 1, 16), noise(1, 1, 16, seed=1)

    def score(query: int, key: int) -> float:
        turned = rotate(q, rotary_table(torch.tensor([query]), 16)) * rotate(k, rotary_table(torch.tensor([key]), 16))
        return float(turned.sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(10, 4)) > 1e-3


def test_a_position_has_the_same_table_in_any_batch():
    positions = torch.arange(1000)
    cos, sin = rotary_table(positions, 32)
    for position in (0, 1, 7, 500, 999):
        alone = rotary_table(torch.tensor([position]), 32)
        assert torch.equal(alone[0][0], cos[position])
        assert torch.equal(alone[1][0], sin[position])


def test_bfloat16_is_turned_in_float32(noise):
    x = noise(4, 2, 16).bfloat16()
    table = rotary_table(torch.arange(4), 16)
    found = rotate(x, table)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), table).bfloat16())


# ── router ────────────────────────────────────────────────────────────────────────────────────

WIDTH, LENGTH = 24, 30


def test_p_compares_q_of_the_previous_with_k_of_the_current_in_any_spans_and_company(noise, sequences, cuts):
    q, k = noise(WIDTH, WIDTH, seed=1), noise(WIDTH, WIDTH, seed=2)
    rows = {row: (noise(LENGTH, WIDTH, seed=10 + row),) for row in (1, 2, 3)}
    found = []
    for ticks in cuts(LENGTH):
        memory = torch.zeros(5, WIDTH)

        def op(spans, h, memory=memory):
            return boundary_probability(h, memory, spans, q, k)

        found.append(sequences(rows).run(op, ticks)[2])
        assert torch.equal(memory[2], rows[2][0][-1])
        assert not memory[0].any()
        assert not memory[4].any()
    h = rows[2][0].double()
    assert found[0][0] == 1.0
    for t in range(1, LENGTH):
        before, now = q.double() @ h[t - 1], k.double() @ h[t]
        p = (1 - float(before @ now) / (float(before.norm()) * float(now.norm()))) / 2
        assert float(found[0][t]) == pytest.approx(p, abs=1e-6)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def step_of(start: int) -> Spans:
    return Spans.of([1], [start], [1], CPU)[0]


def test_the_first_position_of_a_sequence_is_a_boundary_whatever_the_row_remembers(noise):
    eye = torch.eye(WIDTH)
    for memory in (torch.zeros(2, WIDTH), torch.full((2, WIDTH), float("nan")), torch.ones(2, WIDTH)):
        assert boundary_probability(torch.ones(1, WIDTH), memory, step_of(0), eye, eye).tolist() == [1.0]
    again = boundary_probability(torch.ones(1, WIDTH), torch.ones(2, WIDTH), step_of(1), eye, eye)
    assert float(again) == pytest.approx(0.0, abs=1e-6)


def test_p_stays_within_zero_and_one(noise):
    eye, h = torch.eye(WIDTH), noise(500, WIDTH)
    for sign in (1.0, -1.0):
        for vector in h:
            memory = torch.stack([vector, vector * sign * 3])
            p = float(boundary_probability(vector[None], memory, step_of(4), eye, eye))
            assert 0.0 <= p <= 1.0
            assert p == pytest.approx(0.0 if sign > 0 else 1.0, abs=1e-6)


def test_a_zero_vector_is_no_division_by_zero():
    eye = torch.eye(WIDTH)
    assert boundary_probability(torch.zeros(1, WIDTH), torch.zeros(2, WIDTH), step_of(1), eye, eye).tolist() == [0.5]


def test_a_cosine_below_what_bfloat16_can_tell_from_zero_is_a_tie():
    eye = torch.eye(2)
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    for cosine, tied in ((1e-3, True), (-1.5e-3, True), (-8e-3, False), (8e-3, False)):
        now = torch.tensor([[cosine, math.sqrt(1 - cosine * cosine)]])
        p = boundary_probability(now.bfloat16(), before.bfloat16(), step_of(3), eye, eye)
        assert p.dtype == torch.float32
        assert (float(p) == 0.5) == tied
        wide = boundary_probability(now, before.clone(), step_of(3), eye, eye)
        assert float(wide) == pytest.approx((1 - cosine) / 2, abs=1e-6)


# ── moving average ────────────────────────────────────────────────────────────────────────────


def test_the_average_is_exact_and_the_same_in_any_spans_and_company(noise, sequences, cuts):
    def probabilities(row: int) -> torch.Tensor:
        p = torch.rand(LENGTH, generator=torch.Generator().manual_seed(row))
        p[0], p[4], p[5] = 1.0, 0.0, 1.0  # clamped to 0.9999, 0.0001
        return p

    rows = {row: (noise(LENGTH, WIDTH, seed=10 + row), probabilities(row)) for row in (1, 2, 3)}
    found = []
    for ticks in cuts(LENGTH):
        memory = torch.zeros(5, WIDTH)

        def op(spans, z, p, memory=memory):
            return smooth(z, p, memory, spans)

        found.append(sequences(rows).run(op, ticks)[2])
        assert torch.equal(memory[2], found[-1][-1])
        assert not memory[0].any()
        assert not memory[4].any()
    z_hat, p = rows[2]
    z_bar = torch.zeros(WIDTH, dtype=torch.float64)
    for t in range(LENGTH):
        weight = min(max(float(p[t]), 1e-4), 1 - 1e-4)
        z_bar = weight * z_hat[t].double() + (1 - weight) * z_bar
        assert torch.allclose(found[0][t].double(), z_bar, rtol=1e-5, atol=1e-6)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_the_average_of_bfloat16_chunks_is_kept_in_float32(noise):
    z, memory = noise(1, WIDTH).bfloat16(), torch.zeros(2, WIDTH)
    found = smooth(z, torch.tensor([0.75]), memory, step_of(2))
    assert found.dtype == torch.float32
    assert torch.equal(found[0], z[0].float() * 0.75)
    assert torch.equal(memory[1], found[0])
