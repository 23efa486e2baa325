"""RMSNorm against float64, one row at a time and many."""

from __future__ import annotations

import pytest
import torch

from hnet_runtime.ops.norm import gated_rms_norm, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("width", [1, 5, 60, 63, 64, 96, 128, 257, 1024])
def test_rms_norm_divides_by_the_root_of_the_mean_square(noise, width):
    x, weight = noise(11, width) * 3, noise(width, seed=1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight).double(), exact, rtol=2e-6, atol=1e-7)


def test_eps_holds_up_what_is_nearly_zero(noise):
    x, weight = noise(3, 64) * 1e-6, torch.ones(64)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    assert torch.allclose(rms_norm(x, weight).double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8)), torch.zeros(2, 8))


def test_the_gate_enters_before_the_norm(noise):
    y, gate, weight = noise(7, 128), noise(7, 128, seed=1) * 2, noise(128, seed=2)
    gated = y.double() * gate.double() / (1 + torch.exp(-gate.double()))
    exact = gated / (gated.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert torch.allclose(gated_rms_norm(y, gate, weight).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [5, 63, 64, 91, 128, 1000])
@pytest.mark.parametrize("count", [1, 2])
def test_a_row_has_the_same_bits_alone_and_among_others(noise, threads, width, count):
    threads(count)
    x, gate, weight = noise(300, width), noise(300, width, seed=3), noise(width, seed=1)
    whole, gated = rms_norm(x, weight), gated_rms_norm(x, gate, weight)
    for row in (0, 1, 16, 133, 299):
        assert torch.equal(rms_norm(x[row : row + 1], weight), whole[row : row + 1])
        assert torch.equal(gated_rms_norm(x[row : row + 1], gate[row : row + 1], weight), gated[row : row + 1])
    assert torch.equal(rms_norm(x[7:40].clone(), weight), whole[7:40])
