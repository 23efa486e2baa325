"""When a kernel's numbers are its twin's: stated once, for all interpreted tests."""

from __future__ import annotations

import torch
from torch import Tensor

FP32 = 2e-6
"""Of the largest number around: sums in another order, and an exponential that is off by a bit or two."""

BF16_ULP = 2.0**-7
"""One unit in the last place, at most, relative to a number; the interpreter cuts off where a device rounds."""


def close(found: Tensor, expected: Tensor, tolerance: float = FP32) -> None:
    """Same dtype, shape and places of what is not finite; each number off by no more than `tolerance` of the largest
    one, and in bf16 one unit in the last place besides."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    left, right = found.double(), expected.double()
    finite = right.isfinite()
    assert torch.equal(left.isnan(), right.isnan())
    assert torch.equal(left[~finite & ~right.isnan()], right[~finite & ~right.isnan()])
    left, right = left[finite], right[finite]
    allowed = tolerance * max(float(right.abs().max()) if right.numel() else 0.0, 1.0)
    allowed = allowed + (right.abs() * BF16_ULP if found.dtype == torch.bfloat16 else 0.0)
    worst = ((left - right).abs() - allowed).max() if right.numel() else torch.tensor(-1.0)
    assert worst <= 0.0, f"{float((left - right).abs().max())} apart, of numbers up to {float(right.abs().max())}"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
