"""Functions of numbers that kernels share, in fp32, without a device library."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x · σ(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + eˣ), with a small relative error where it is small, too.

    max(x, 0) + log1p(e) with e = exp(−|x|) in (0, 1], and log1p(e) = 2 artanh(s), s = e / (2 + e) ≤ ⅓: the series to
    s¹⁵ is as exact as fp32. Above the twin's threshold log1p(e) is lost in rounding, so that it is x here as well.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def rounded_to_bf16(x):
    """fp32 rounded to the nearest bf16, ties to even, as fp32; what is not a number stays so."""
    bits = x.to(tl.uint32, bitcast=True)
    odd = (bits >> 16) & 1
    nearest = ((bits + 0x7FFF + odd) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)
