"""Smoothing over spans: the exponential moving average, position after position in each channel."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.ema import P_MAX, P_MIN
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton.launching import blocks, launch
from hnet_runtime.ops.triton.packed_spans import PackedSpans, position_stride

SMOOTH_CHANNELS, SMOOTH_TIMES, SMOOTH_WARPS = 128, 8, 1
"""One warp has all times of its channels: 4 channels a thread, and as many times read at once."""


@triton.jit
def smooth_spans(
    z_ptr,  # [C, ≥ D]
    p_ptr,  # [C] fp32
    memory_ptr,  # [rows, D] fp32
    out_ptr,  # [C, D] fp32
    rows_ptr,
    lengths_ptr,
    offsets_ptr,
    z_stride,
    P_MIN: tl.constexpr,
    P_MAX: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TIMES: tl.constexpr,
):
    """A block of one span's channels, through all its times."""
    span = tl.program_id(1)
    length = tl.load(lengths_ptr + span)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < D
    own = memory_ptr + tl.load(rows_ptr + span) * D + channels
    carried = tl.load(own, mask=inside, other=0.0)
    index = tl.arange(0, TIMES)
    for begin in range(0, length, TIMES):
        # Several times are read at once, so that a time waits for its arithmetic only.
        running = begin + index < length
        places = tl.load(offsets_ptr + begin + index, mask=running, other=0) + span
        places = tl.where(running, places, 0)
        p = tl.load(p_ptr + places, mask=running, other=0.0)
        weights = tl.minimum(tl.maximum(p, P_MIN), P_MAX)
        mask = running[:, None] & inside[None, :]
        z = tl.load(z_ptr + places[:, None] * z_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        entering = z * weights[:, None]
        smoothed = tl.zeros_like(entering)
        for time in tl.static_range(TIMES):
            here = index == time
            weight = tl.sum(tl.where(here, weights, 0.0), 0)
            added = tl.sum(tl.where(here[:, None], entering, 0.0), 0)
            keep = tl.where(begin + time < length, 1.0 - weight, 1.0)
            carried = carried * keep + added
            smoothed = tl.where(here[:, None], carried[None, :], smoothed)
        tl.store(out_ptr + places[:, None] * D + channels[None, :], smoothed, mask=mask)
    tl.store(own, carried, mask=inside)


def smooth(z: Tensor, p: Tensor, memory: Tensor, spans: Spans) -> Tensor:
    """ops.ema.smooth: z̄ ← P ẑ + (1 − P) z̄ at each position, in order of time.

    Products and sums are rounded one by one (no fused multiply-add), so the numbers are the twin's, bit for bit.

    z: [C, ≥ D] fp32 or bf16, of which the first D channels enter; p: [C] fp32; memory: [rows, D] fp32 (updated in
    place) → z̄: [C, D] fp32.
    """
    width = memory.shape[1]
    packed = PackedSpans.of(spans)
    out = torch.empty(z.shape[0], width, dtype=torch.float32, device=z.device)
    launch(
        smooth_spans, (blocks(width, SMOOTH_CHANNELS), len(packed)),
        z, p, memory, out, packed.rows, packed.lengths, packed.offsets, position_stride(z),
        P_MIN=P_MIN, P_MAX=P_MAX, D=width, BLOCK=SMOOTH_CHANNELS, TIMES=SMOOTH_TIMES,
        num_warps=SMOOTH_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
