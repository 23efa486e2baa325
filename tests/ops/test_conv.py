"""The causal convolution, carried over spans."""

from __future__ import annotations

import pytest
import torch

from hnet_runtime.ops.conv import causal_conv

LENGTH = 70


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[L, E] by a loop over positions and taps, in float64."""
    taps = len(weight)
    out = torch.empty(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        total = bias.double().clone()
        for k in range(taps):
            if t - taps + 1 + k >= 0:
                total += weight[k].double() * x[t - taps + 1 + k].double()
        out[t] = total / (1 + torch.exp(-total))
    return out


@pytest.mark.parametrize("taps", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("channels", [3, 64, 91, 192])
def test_the_convolution_is_exact_and_the_same_in_any_spans_and_company(noise, sequences, cuts, taps, channels):
    weight, bias = noise(taps, channels, seed=1), noise(channels, seed=2)
    rows = {row: (noise(LENGTH, channels, seed=10 + row),) for row in (1, 2, 3)}
    found = []
    for ticks in cuts(LENGTH):
        state = torch.zeros(5, taps - 1, channels)

        def op(spans, x, state=state):
            return causal_conv(x, state, spans, weight, bias)

        found.append(sequences(rows).run(op, ticks)[2])
        assert not state[0].any()  # nobody's row
        assert not state[4].any()
        assert torch.equal(state[2], rows[2][0][LENGTH - taps + 1 :])
    assert torch.allclose(found[0].double(), exact(rows[2][0], weight, bias), rtol=1e-5, atol=1e-6)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_span_shorter_than_the_taps_keeps_what_was_carried(noise, sequences):
    weight, bias, x = noise(6, 8, seed=1), noise(8, seed=2), noise(4, 8)
    state = torch.zeros(3, 5, 8)
    sequences({1: (x,)}).run(lambda spans, x: causal_conv(x, state, spans, weight, bias), [{1: 2}, {1: 2}])
    assert torch.equal(state[1], torch.cat([torch.zeros(1, 8), x]))


def test_bfloat16_inputs_are_summed_in_float32(noise, sequences):
    weight, bias, x = noise(4, 16, seed=1), noise(16, seed=2), noise(20, 16).bfloat16()
    state = torch.zeros(3, 3, 16, dtype=torch.bfloat16)
    found = sequences({1: (x,)}).run(lambda spans, x: causal_conv(x, state, spans, weight, bias), [{1: 9}, {1: 11}])
    assert found[1].dtype == torch.float32
    assert torch.allclose(found[1].double(), exact(x, weight, bias), rtol=1e-5, atol=1e-6)
