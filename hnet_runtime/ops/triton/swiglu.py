"""The SwiGLU product between an MLP's two projections."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.triton.arithmetic import silu
from hnet_runtime.ops.triton.launching import blocks, launch, operation, power_of_two, row_stride

BLOCK, WARPS = 512, 2
"""Channels of one program: 8 a thread, one load of 16 bytes in bf16."""


@triton.jit
def _swiglu(y, out, y_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64)
    inside = channel < WIDTH
    value = tl.load(y + place * y_stride + channel, inside, other=0.0).to(tl.float32)
    gate = tl.load(y + place * y_stride + WIDTH + channel, inside, other=0.0).to(tl.float32)
    tl.store(out + place * WIDTH + channel, (silu(gate) * value).to(out.dtype.element_ty), inside)


def _empty(y: Tensor) -> Tensor:
    return torch.empty((y.shape[0], y.shape[1] // 2), dtype=y.dtype, device=y.device)


@operation(fake=_empty)
def swiglu(y: Tensor) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.swiglu`)."""
    out = _empty(y)
    width = out.shape[1]
    block = min(BLOCK, power_of_two(width))
    launch(_swiglu, (blocks(width, block), len(y)), y, out, row_stride(y), WIDTH=width, BLOCK=block, num_warps=WARPS)
    return out
