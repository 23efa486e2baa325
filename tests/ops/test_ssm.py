"""Mamba-2's recurrence against a loop in float64, across the borders of what is walked at once."""

from __future__ import annotations

import pytest
import torch

from hnet_runtime.ops import ssm
from hnet_runtime.ops.ssm import selective_scan

LENGTH, HEADS, CHANNELS, STATES = 40, 2, 6, 5


def parameters(noise):
    return -torch.exp(noise(HEADS, seed=1)), noise(HEADS, seed=2)  # A, D


def inputs(noise, seed: int) -> tuple[torch.Tensor, ...]:
    """x, Δ, B, C of one row."""
    return (
        noise(LENGTH, HEADS, CHANNELS, seed=seed),
        torch.rand(LENGTH, HEADS, generator=torch.Generator().manual_seed(seed)),
        noise(LENGTH, STATES, seed=seed + 100),
        noise(LENGTH, STATES, seed=seed + 200),
    )


def exact(row: tuple[torch.Tensor, ...], a: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, dt, b, c = (tensor.double() for tensor in row)
    state = torch.zeros(HEADS, CHANNELS, STATES, dtype=torch.float64)
    out = torch.empty_like(x)
    for t in range(LENGTH):
        for h in range(HEADS):
            state[h] = state[h] * torch.exp(dt[t, h] * a[h].double()) + dt[t, h] * torch.outer(x[t, h], b[t])
            out[t, h] = state[h] @ c[t] + d[h].double() * x[t, h]
    return out, state


# From one position at a time to everything at once; and a step of one row at a time to all.
@pytest.mark.parametrize("floats", [1, 2 * HEADS * CHANNELS * STATES, 7 * HEADS * CHANNELS * STATES, 1 << 22])
def test_the_scan_is_exact_and_the_same_in_any_spans_company_and_chunks(noise, sequences, cuts, monkeypatch, floats):
    monkeypatch.setattr(ssm, "_CHUNK_FLOATS", floats)
    monkeypatch.setattr(ssm, "_CACHE_FLOATS", floats)
    a, d = parameters(noise)
    rows = {row: inputs(noise, 10 + row) for row in (1, 2, 3)}
    truth, end = exact(rows[2], a, d)
    found = []
    for ticks in cuts(LENGTH):
        state = torch.zeros(5, HEADS, CHANNELS, STATES)

        def op(spans, x, dt, b, c, state=state):
            return selective_scan(x, dt, a, b, c, d, state, spans)

        found.append(sequences(rows).run(op, ticks)[2])
        assert torch.allclose(state[2].double(), end, rtol=1e-5, atol=1e-5)
        assert not state[0].any()
        assert not state[4].any()
    assert torch.allclose(found[0].double(), truth, rtol=1e-5, atol=1e-5)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_chunks_of_any_size_give_the_same_bits(noise, sequences, monkeypatch):
    a, d = parameters(noise)
    rows = {row: inputs(noise, 10 + row) for row in (1, 2, 3, 4)}
    found = []
    for floats in (1, 100, 500, 1500, 1 << 22):
        monkeypatch.setattr(ssm, "_CHUNK_FLOATS", floats)
        state = torch.zeros(5, HEADS, CHANNELS, STATES)

        def op(spans, x, dt, b, c, state=state):
            return selective_scan(x, dt, a, b, c, d, state, spans)

        found.append((sequences(rows).run(op, [{4: 3, 2: 40, 1: 17, 3: 40}]), state))
    for other, state in found[1:]:
        assert torch.equal(state, found[0][1])
        for row in rows:
            assert torch.equal(other[row], found[0][0][row])


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (3, 4, 1, 2), (4, 2, 1, 3)])
@pytest.mark.parametrize("floats", [1, 130, 1 << 17])
def test_a_step_updates_rows_in_place_in_any_order(noise, sequences, monkeypatch, order, floats):
    """Consecutive rows are updated where they lie, others gathered: the bits are the same."""
    a, d = parameters(noise)
    rows = {row: inputs(noise, 10 + row) for row in (1, 2, 3, 4)}

    def run(ticks):
        state = torch.zeros(6, HEADS, CHANNELS, STATES)

        def op(spans, x, dt, b, c):
            return selective_scan(x, dt, a, b, c, d, state, spans)

        return sequences(rows).run(op, ticks), state

    monkeypatch.setattr(ssm, "_CACHE_FLOATS", floats)
    together, state = run([dict.fromkeys(order, 1)] * 10)
    for row in order:
        alone, own = run([{row: 1}] * 10)
        assert torch.equal(together[row], alone[row])
        assert torch.equal(state[row], own[row])
    assert not state[0].any()
    assert not state[5].any()
