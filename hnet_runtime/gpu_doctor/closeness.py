"""When a kernel's numbers are its twin's: stated once, for a GPU's checks and for interpreted tests."""

from __future__ import annotations

import torch
from torch import Tensor

FP32 = 2e-6
"""Of the largest number around: sums in another order, and an exponential that is off by a bit or two."""

BF16_ULP = 2.0**-7
"""One unit in the last place, at most, relative to a number; the interpreter cuts off where a device rounds."""


def close(found: Tensor, expected: Tensor, tolerance: float = FP32) -> float:
    """Same dtype, shape and places of what is not finite; each number off by no more than `tolerance` of the largest
    one, and in bf16 one unit in the last place besides. Gives the largest difference; AssertionError says what is not
    so."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise AssertionError(f"{found.dtype} {tuple(found.shape)} for {expected.dtype} {tuple(expected.shape)}")
    left, right = found.double(), expected.double()
    finite = right.isfinite()
    if not torch.equal(left.isnan(), right.isnan()):
        raise AssertionError("NaN in other places")
    infinite = ~finite & ~right.isnan()
    if not torch.equal(left[infinite], right[infinite]):
        raise AssertionError("infinities in other places")
    left, right = left[finite], right[finite]
    if not right.numel():
        return 0.0
    apart, largest = (left - right).abs(), float(right.abs().max())
    allowed = tolerance * max(largest, 1.0)
    over = apart - (right.abs() * BF16_ULP if found.dtype == torch.bfloat16 else 0.0) - allowed
    if not float(over.max()) <= 0.0:
        raise AssertionError(f"{float(apart.max()):.3g} apart, of numbers up to {largest:.3g}; allowed {allowed:.3g}")
    return float(apart.max())


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers on the CPU, the same for a shape and a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
