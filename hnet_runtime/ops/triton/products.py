"""Matrix products inside kernels, in fp32 as far as the twins' tolerances ask, on tensor cores where operands allow.

A bf16 value is exact in tf32, so a product of two such operands needs one pass of tf32. An fp32 operand beside a bf16
one is split in two parts that tf32 takes, which leaves an error of about 2⁻²¹ of it. Two fp32 operands are
multiplied as they are (`ieee`): slow, exact, and for fp32 models only, which are for checks.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hnet_runtime.ops.triton.launching import power_of_two


def block_of(size: int) -> int:
    """The block that holds `size` channels of a product: a power of two, at least the 16 that tensor cores take."""
    return max(16, power_of_two(size))


@triton.jit
def product(left, right, NARROW: tl.constexpr):
    """left · right; both hold bf16 values where NARROW."""
    return tl.dot(left, right, input_precision="tf32" if NARROW else "ieee")


@triton.jit
def wide_product(left, right, NARROW: tl.constexpr):
    """left · right; left is fp32, right holds bf16 values where NARROW."""
    if NARROW:
        # The mask leaves what tf32 has of fp32: sign, exponent and ten bits of the mantissa.
        high = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        result = tl.dot(left - high, right, input_precision="tf32")
        result = tl.dot(high, right, result, input_precision="tf32")
    else:
        result = tl.dot(left, right, input_precision="ieee")
    return result
