"""The router's verdict on one position of each row: what stands before and after its two matrix products, in fp32."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.linear import linear
from hnet_runtime.ops.router import NORM_FLOOR
from hnet_runtime.ops.triton.arithmetic import rounded_to_bf16
from hnet_runtime.ops.triton.launching import blocks, contiguous, launch, operation, power_of_two, row_stride
from hnet_runtime.ops.triton.norm import warps_of

BLOCK, WARPS = 512, 2
"""Channels of one program that takes vectors over: 8 a thread."""


@triton.jit
def _take_over(h, memory, rows, previous, current, h_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64)
    inside = channel < WIDTH
    own = memory + tl.load(rows + place) * WIDTH + channel
    before = tl.load(own, inside, other=0.0)
    now = tl.load(h + place * h_stride + channel, inside, other=0.0)
    tl.store(previous + place * WIDTH + channel, before.to(tl.float32), inside)
    tl.store(current + place * WIDTH + channel, now.to(tl.float32), inside)
    tl.store(own, now, inside)


@triton.jit
def _verdict(
    q,
    k,
    positions,
    p,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_BF16: tl.constexpr,
    FLOOR: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    asked = tl.load(q + place * WIDTH + channel, inside, other=0.0)
    given = tl.load(k + place * WIDTH + channel, inside, other=0.0)
    # A threshold follows: roots and quotients are the correctly rounded ones.
    norms = tl.maximum(tl.sqrt_rn(tl.sum(asked * asked, 0)), FLOOR) * tl.maximum(
        tl.sqrt_rn(tl.sum(given * given, 0)), FLOOR
    )
    distance = 1.0 - tl.div_rn(tl.sum(asked * given, 0), norms)
    if IN_BF16:
        distance = rounded_to_bf16(distance)
    half = distance * 0.5
    # Written so that what is not a number stays so: it is above no threshold.
    half = tl.where(half < 0.0, 0.0, half)
    half = tl.where(half > 1.0, 1.0, half)
    tl.store(p + place, tl.where(tl.load(positions + place) == 0, 1.0, half))


def _empty(h: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(len(h), dtype=torch.float32, device=h.device)


@operation(fake=_empty, mutates=("memory",))
def router_step(
    h: Tensor, memory: Tensor, rows: Tensor, positions: Tensor, q_weight: Tensor, k_weight: Tensor
) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.router`). The products are the library's, in fp32."""
    contiguous(memory, rows, positions)
    count, width = h.shape
    previous, current = torch.empty((2, count, width), dtype=torch.float32, device=h.device).unbind(0)
    p = _empty(h)
    block = min(BLOCK, power_of_two(width))
    launch(
        _take_over,
        (blocks(width, block), count),
        h,
        memory,
        rows,
        previous,
        current,
        row_stride(h),
        WIDTH=width,
        BLOCK=block,
        num_warps=WARPS,
    )
    launch(
        _verdict,
        (count,),
        linear(previous, q_weight),
        linear(current, k_weight),
        positions,
        p,
        WIDTH=width,
        BLOCK=power_of_two(width),
        IN_BF16=h.dtype == torch.bfloat16,
        FLOOR=NORM_FLOOR,
        num_warps=warps_of(width),
    )
    return p
