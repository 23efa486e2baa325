"""Smoothing of one position of each row: the twin's numbers, bit for bit, as prefill's."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.ema import P_MAX, P_MIN
from hnet_runtime.ops.triton.launching import blocks, contiguous, launch, operation, power_of_two, row_stride

BLOCK, WARPS = 512, 2
"""Channels of one program: 8 a thread."""


@triton.jit
def _ema_step(
    z,
    place,
    p,
    opened,
    memory,
    rows,
    residual,
    out,
    z_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    P_MIN: tl.constexpr,
    P_MAX: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.program_id(1).to(tl.int64)
    inside = channel < WIDTH
    own = memory + tl.load(rows + index) * WIDTH + channel
    smoothed = tl.load(own, inside, other=0.0)
    if tl.load(opened + index) != 0:
        chunk = tl.load(z + tl.load(place + index) * z_stride + channel, inside, other=0.0).to(tl.float32)
        weight = tl.minimum(tl.maximum(tl.load(p + index), P_MIN), P_MAX)
        smoothed = smoothed * (1.0 - weight) + chunk * weight
        tl.store(own, smoothed, inside)
    _join(smoothed, residual, out, index * WIDTH + channel, inside)


@triton.jit
def _ema_kept(memory, rows, residual, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.program_id(1).to(tl.int64)
    inside = channel < WIDTH
    smoothed = tl.load(memory + tl.load(rows + index) * WIDTH + channel, inside, other=0.0)
    _join(smoothed, residual, out, index * WIDTH + channel, inside)


@triton.jit
def _join(smoothed, residual, out, where, inside):
    total = smoothed + tl.load(residual + where, inside, other=0.0)
    tl.store(out + where, total.to(out.dtype.element_ty), inside)


def _empty(z: Tensor, *arguments: Tensor) -> Tensor:
    return torch.empty(arguments[-1].shape, dtype=z.dtype, device=z.device)


@operation(fake=_empty, mutates=("memory",))
def ema_step(
    z: Tensor, place: Tensor, p: Tensor, opened: Tensor, memory: Tensor, rows: Tensor, residual: Tensor
) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.ema`)."""
    contiguous(place, p, opened, memory, rows, residual)
    width = memory.shape[1]
    out = _empty(z, residual)
    block = min(BLOCK, power_of_two(width))
    launch(
        _ema_step,
        (blocks(width, block), len(rows)),
        z,
        place,
        p,
        opened,
        memory,
        rows,
        residual,
        out,
        row_stride(z),
        WIDTH=width,
        BLOCK=block,
        P_MIN=P_MIN,
        P_MAX=P_MAX,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return out


def _empty_kept(memory: Tensor, rows: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(residual.shape, dtype=dtype, device=memory.device)


@operation(fake=_empty_kept)
def ema_kept(memory: Tensor, rows: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.ema`)."""
    contiguous(memory, rows, residual)
    width = memory.shape[1]
    out = _empty_kept(memory, rows, residual, dtype)
    block = min(BLOCK, power_of_two(width))
    launch(
        _ema_kept,
        (blocks(width, block), len(rows)),
        memory,
        rows,
        residual,
        out,
        WIDTH=width,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out
