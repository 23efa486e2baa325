"""Mamba-2's recurrence for one position of each row: the state passes through registers once, in place."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.triton.arithmetic import softplus
from hnet_runtime.ops.triton.launching import blocks, contiguous, launch, operation, power_of_two, row_stride

CHANNELS, WARPS = 8, 1
"""Channels of one head that a program steps. With 128 states that is 32 fp32 a thread, in eight loads of 16 bytes that
are under way at once, and one warp holds whole channels: y's sum stays in it, and no program waits for another warp.
One row of 32 heads makes 256 programs, enough for every unit of a device."""


@triton.jit
def _ssm_step(
    xbc,
    dt,
    a,
    dt_bias,
    d,
    state,
    rows,
    y,
    xbc_stride,
    dt_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    parts: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // parts
    place = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = tl.arange(0, BLOCK_N)
    has_channel, has_lane = channel < HEAD_DIM, lane < STATES
    inside = has_channel[:, None] & has_lane[None, :]

    row = tl.load(rows + place)
    own = state + (row * HEADS + head) * (HEAD_DIM * STATES) + channel[:, None] * STATES + lane[None, :]
    before = tl.load(own, inside, other=0.0)  # [P, N]
    taken = xbc + place * xbc_stride
    x = tl.load(taken + head * HEAD_DIM + channel, has_channel, other=0.0).to(tl.float32)
    b = tl.load(taken + HEADS * HEAD_DIM + lane, has_lane, other=0.0).to(tl.float32)
    c = tl.load(taken + HEADS * HEAD_DIM + STATES + lane, has_lane, other=0.0).to(tl.float32)
    step = softplus(tl.load(dt + place * dt_stride + head).to(tl.float32) + tl.load(dt_bias + head))
    decay = tl.exp(step * tl.load(a + head))

    now = before * decay + (step * x)[:, None] * b[None, :]
    tl.store(own, now, inside)
    out = tl.sum(now * c[None, :], 1) + tl.load(d + head) * x
    tl.store(y + place * (HEADS * HEAD_DIM) + head * HEAD_DIM + channel, out.to(y.dtype.element_ty), has_channel)


def _empty(xbc: Tensor, dt: Tensor, a: Tensor, dt_bias: Tensor, d: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    return torch.empty((len(xbc), state.shape[1] * state.shape[2]), dtype=xbc.dtype, device=xbc.device)


@operation(fake=_empty, mutates=("state",))
def ssm_step(xbc: Tensor, dt: Tensor, a: Tensor, dt_bias: Tensor, d: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.ssm`); xbc may be a view with any row stride, too."""
    contiguous(a, dt_bias, d, state, rows)
    heads, head_dim, states = state.shape[1:]
    y = _empty(xbc, dt, a, dt_bias, d, state, rows)
    channels = min(CHANNELS, power_of_two(head_dim))
    launch(
        _ssm_step,
        (heads * blocks(head_dim, channels), len(xbc)),
        xbc,
        dt,
        a,
        dt_bias,
        d,
        state,
        rows,
        y,
        row_stride(xbc),
        row_stride(dt),
        HEADS=heads,
        HEAD_DIM=head_dim,
        STATES=states,
        BLOCK_P=channels,
        BLOCK_N=power_of_two(states),
        num_warps=WARPS,
    )
    return y
