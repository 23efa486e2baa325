"""The convolution of one position of each row: reads a row's carried inputs once, and shifts them in place."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.triton.arithmetic import silu
from hnet_runtime.ops.triton.launching import blocks, contiguous, launch, operation, power_of_two, row_stride

BLOCK, WARPS = 512, 2
"""Channels of one program: 8 a thread, one load of 16 bytes in bf16. Small, so that one row fills several units."""


@triton.jit
def _conv_step(
    x,
    state,
    rows,
    weight,
    bias,
    out,
    x_stride,
    WIDTH: tl.constexpr,
    CARRIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64)
    inside = channel < WIDTH
    own = state + tl.load(rows + place) * (CARRIED * WIDTH) + channel
    now = tl.load(x + place * x_stride + channel, inside, other=0.0)
    # All loads stand before the stores: what is stored might be what is loaded, for all the compiler knows.
    held = ()
    for tap in tl.static_range(CARRIED):
        held = held + (tl.load(own + tap * WIDTH, inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(CARRIED):
        total += held[tap].to(tl.float32) * tl.load(weight + tap * WIDTH + channel, inside, other=0.0)
    total += now.to(tl.float32) * tl.load(weight + CARRIED * WIDTH + channel, inside, other=0.0)
    total += tl.load(bias + channel, inside, other=0.0)
    for tap in tl.static_range(1, CARRIED):
        tl.store(own + (tap - 1) * WIDTH, held[tap], inside)
    tl.store(own + (CARRIED - 1) * WIDTH, now, inside)
    tl.store(out + place * WIDTH + channel, silu(total).to(out.dtype.element_ty), inside)


def _empty(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operation(fake=_empty, mutates=("state",))
def conv_step(x: Tensor, state: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.conv`)."""
    contiguous(state, rows, weight, bias)
    width = x.shape[1]
    out = _empty(x)
    block = min(BLOCK, power_of_two(width))
    launch(
        _conv_step,
        (blocks(width, block), len(x)),
        x,
        state,
        rows,
        weight,
        bias,
        out,
        row_stride(x),
        WIDTH=width,
        CARRIED=state.shape[1],
        BLOCK=block,
        num_warps=WARPS,
    )
    return out
