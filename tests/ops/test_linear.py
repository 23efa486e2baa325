"""Matrix products whose bits do not depend on how many rows there are, nor on a row's place."""

from __future__ import annotations

import pytest
import torch

from hnet_runtime.ops.linear import ROW_TILE, linear

WIDTHS = [(64, 64), (64, 388), (91, 273), (63, 60), (96, 256), (128, 8), (200, 130), (256, 1024), (257, 31), (1000, 33)]
COUNTS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 50]


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_a_row_has_the_same_bits_in_any_company_and_at_any_place(noise, inputs, outputs):
    weight, x = noise(outputs, inputs, seed=1), noise(max(COUNTS), inputs)
    alone = torch.cat([linear(x[row : row + 1], weight) for row in range(len(x))])
    for count in COUNTS:
        assert torch.equal(linear(x[:count], weight), alone[:count])
        shifted = torch.cat([noise(5, inputs, seed=count), x[:count]])
        assert torch.equal(linear(shifted, weight)[5:], alone[:count])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x[order], weight), alone[order])


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_rows_that_do_not_lie_close_together_have_the_same_bits(noise, inputs, outputs):
    weight, wide = noise(outputs, inputs, seed=1), noise(40, inputs + 3)
    x = wide[:, :inputs]
    assert not x.is_contiguous()
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight))


def test_two_threads_keep_every_row_independent_of_its_company(noise, threads):
    threads(2)
    weight, x = noise(768, 256, seed=1), noise(40, 256)
    whole = linear(x, weight)
    for row in range(40):
        assert torch.equal(linear(x[row : row + 1], weight), whole[row : row + 1])


@pytest.mark.parametrize("count", [0, *COUNTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_bias_are_those_of_float64(noise, count, dtype):
    weight, bias, x = noise(48, 80, seed=1).to(dtype), noise(48, seed=2).to(dtype), noise(count, 80).to(dtype)
    exact = x.double() @ weight.double().T
    found = linear(x, weight)
    assert found.dtype == dtype
    assert found.shape == (count, 48)
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert ((found.double() - exact).abs() <= rounding * (1 + exact.abs())).all()
    assert torch.equal(linear(x, weight, bias), found + bias)


def test_what_is_not_finite_in_a_row_stays_in_it(noise):
    weight, x = noise(70, 64, seed=1), noise(20, 64)
    clean = linear(x, weight)
    spoiled = x.clone()
    spoiled[4], spoiled[17] = float("nan"), float("inf")
    found = linear(spoiled, weight)
    assert found[4].isnan().all()
    assert not found[17].isfinite().any()
    rest = [row for row in range(20) if row not in (4, 17)]
    assert torch.equal(found[rest], clean[rest])


def test_the_input_is_left_as_it_was(noise):
    weight, x = noise(32, 32, seed=1), noise(ROW_TILE + 3, 32)
    before = x.clone()
    linear(x, weight)
    assert torch.equal(x, before)
