"""SiLU, softplus and the SwiGLU product: accuracy at the extremes, and bits that do not depend on place."""

from __future__ import annotations

import math

import pytest
import torch

from hnet_runtime.ops.activation import silu, softplus
from hnet_runtime.ops.swiglu import swiglu

NAN, INF = float("nan"), float("inf")
EXTREMES = [0.0, 1e-30, -1e-30, 1e-6, -1e-6, 0.5, -0.5, 19.99, 20.0, 20.01, -20.0, 60.0, -60.0, 1e4, -1e4]


def spread(noise, count: int) -> torch.Tensor:
    x = noise(count) * 6
    x[::5] *= 20
    return x


@pytest.mark.parametrize("op", [silu, softplus])
def test_an_element_has_the_same_bits_wherever_it_stands(noise, op):
    x = spread(noise, 5003)
    whole = op(x)
    for begin in (0, 1, 3, 8, 17):
        for count in (1, 2, 7, 8, 9, 15, 16, 17, 33, 100, 4096):
            assert torch.equal(op(x[begin : begin + count]), whole[begin : begin + count])
            assert torch.equal(op(x[begin : begin + count].clone()), whole[begin : begin + count])
    assert torch.equal(op(x[::3]), whole[::3])
    assert torch.equal(op(x[:5000].view(50, 100).t()), whole[:5000].view(50, 100).t())


@pytest.mark.parametrize("op", [silu, softplus])
def test_an_element_has_the_same_bits_when_two_threads_share_the_tensor(noise, threads, op):
    x = spread(noise, 200_003)
    threads(1)
    once = op(x)
    threads(2)
    assert torch.equal(op(x), once)
    assert torch.equal(op(x[99_991:100_011]), once[99_991:100_011])


@pytest.mark.parametrize("value", EXTREMES)
def test_silu_is_accurate_at_the_extremes(value):
    exact = value / (1.0 + math.exp(-value)) if value > -700 else 0.0
    found = float(silu(torch.tensor([value])))
    assert abs(found - exact) <= 1e-6 * abs(exact) + 1e-30


@pytest.mark.parametrize("value", EXTREMES)
def test_softplus_is_accurate_at_the_extremes(value):
    exact = value + math.log1p(math.exp(-value)) if value > 0 else math.log1p(math.exp(value))
    found = float(softplus(torch.tensor([value])))
    assert abs(found - exact) <= 1e-6 * abs(exact) + 1e-30
    assert found >= 0.0


def test_softplus_never_decreases_across_its_threshold():
    x = torch.linspace(19.9, 20.1, 10001)
    assert (softplus(x).diff() >= 0).all()


def test_what_is_not_finite_is_said_so():
    assert silu(torch.tensor([NAN])).isnan().all()
    assert softplus(torch.tensor([NAN])).isnan().all()
    assert softplus(torch.tensor([INF, -INF])).tolist() == [INF, 0.0]
    assert float(silu(torch.tensor([INF]))) == INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_multiplies_values_first_by_the_silu_of_gates_last(noise, dtype):
    y = (noise(9, 2 * 130) * 3).to(dtype)
    value, gate = y[:, :130].double(), y[:, 130:].double()
    exact = value * gate / (1 + torch.exp(-gate))
    found = swiglu(y)
    assert found.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + 1e-30).all()
    assert torch.equal(swiglu(y[4:5]), found[4:5])
