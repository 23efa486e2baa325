"""RMSNorm with the residual stream, and gated: one program a row, which reads it once and keeps it in registers."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.config import NORM_EPS
from hnet_runtime.ops.triton.arithmetic import silu
from hnet_runtime.ops.triton.launching import contiguous, launch, operation, power_of_two, row_stride


@triton.jit
def _add_rms_norm(
    h,
    residual,
    weight,
    out,
    h_stride,
    WIDTH: tl.constexpr,
    BEGINS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    stream = residual + row * WIDTH + channel
    x = tl.load(h + row * h_stride + channel, inside, other=0.0).to(tl.float32)
    before = 0.0 if BEGINS else tl.load(stream, inside, other=0.0)
    x = before + x
    scale = tl.load(weight + channel, inside, other=0.0)
    tl.store(stream, x, inside)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS) * scale
    tl.store(out + row * WIDTH + channel, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _gated_norm_step(
    y, gate, weight, out, y_stride, gate_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    opening = tl.load(gate + row * gate_stride + channel, inside, other=0.0).to(tl.float32)
    x = tl.load(y + row * y_stride + channel, inside, other=0.0).to(tl.float32) * silu(opening)
    scale = tl.load(weight + channel, inside, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS) * scale
    tl.store(out + row * WIDTH + channel, normed.to(out.dtype.element_ty), inside)


def warps_of(width: int) -> int:
    """Warps of a program that holds a whole row: 8 numbers a thread, which for bf16 is one load of 16 bytes."""
    return min(max(power_of_two(width) // 256, 1), 16)


def _empty(y: Tensor, *_: Any) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@operation(fake=_empty, mutates=("residual",))
def add_rms_norm(h: Tensor, residual: Tensor, weight: Tensor, begins: bool) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.norm`); h may be a view with any row stride."""
    contiguous(residual, weight)
    width = h.shape[1]
    out = _empty(h)
    launch(
        _add_rms_norm,
        (len(h),),
        h,
        residual,
        weight,
        out,
        row_stride(h),
        WIDTH=width,
        BEGINS=begins,
        BLOCK=power_of_two(width),
        EPS=NORM_EPS,
        num_warps=warps_of(width),
    )
    return out


@operation(fake=_empty)
def gated_norm_step(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.norm`)."""
    contiguous(weight)
    width = y.shape[1]
    out = _empty(y)
    launch(
        _gated_norm_step,
        (len(y),),
        y,
        gate,
        weight,
        out,
        row_stride(y),
        row_stride(gate),
        WIDTH=width,
        BLOCK=power_of_two(width),
        EPS=NORM_EPS,
        num_warps=warps_of(width),
    )
    return out
