"""Matrix products inside kernels: fp32 as far as the twins' tolerances ask, on tensor cores.

Products of bf16 values are exact in fp32, in which they are summed. An fp32 operand beside a bf16 one is split into a
high and a low bf16 part, which leaves an error of 2⁻¹⁸ of a product; two fp32 operands are both split for tf32
(`tf32x3`), which leaves about 2⁻²¹. Multiplied as they are (`ieee`) they would leave the tensor cores, and ptxas
spills thousands of registers over tiles of this size.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hnet_runtime.ops.triton.arithmetic import rounded_to_bf16
from hnet_runtime.ops.triton.launching import power_of_two

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter would multiply the bits of bf16 as integers, and cuts off where a device rounds: it takes the same
values as fp32."""


def block_of(size: int) -> int:
    """The block that holds `size` channels of a product: a power of two, at least the 16 that tensor cores take."""
    return max(16, power_of_two(size))


@triton.jit
def product(left, right, NARROW: tl.constexpr):
    """left · right in fp32; both are bf16 where NARROW, fp32 else."""
    return tl.dot(_operand(left), _operand(right), input_precision=None if NARROW else "tf32x3")


@triton.jit
def wide_product(left, right, NARROW: tl.constexpr):
    """left · right in fp32; left is fp32, right bf16 where NARROW, fp32 else."""
    if NARROW:
        high = _as_bf16(left)
        low = _as_bf16(left - high.to(tl.float32))
        result = tl.dot(_operand(low), _operand(right))
        result = tl.dot(_operand(high), _operand(right), result)
    else:
        result = tl.dot(left, right, input_precision="tf32x3")
    return result


@triton.jit
def _as_bf16(x):
    return rounded_to_bf16(x) if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def _operand(x):
    return x.to(tl.float32) if INTERPRETED else x
