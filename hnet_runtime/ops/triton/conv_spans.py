"""The short causal convolution over spans, with the inputs that each row carries."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton.launching import blocks, launch
from hnet_runtime.ops.triton.packed_spans import PackedSpans, position_stride

CONV_POSITIONS, CONV_CHANNELS, CONV_WARPS = 16, 128, 4
"""Of one program: 16 positions, so that taps are read once from memory and then from cache."""
CARRY_CHANNELS, CARRY_WARPS = 256, 1


@triton.jit(do_not_specialize=["total"])
def convolve_spans(
    x_ptr,  # [T, E]
    state_ptr,  # [rows, K − 1, E]
    weight_ptr,  # [K, E] fp32
    bias_ptr,  # [E] fp32
    out_ptr,  # [T, E]
    rows_ptr,
    offsets_ptr,
    span_of_ptr,
    time_of_ptr,
    total,
    x_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A block of positions, whichever spans they belong to, and of channels."""
    channels = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    places = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside, present = channels < E, places < total
    span = tl.load(span_of_ptr + places, mask=present, other=0)
    time = tl.load(time_of_ptr + places, mask=present, other=0)
    row = tl.load(rows_ptr + span)
    out = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for tap in tl.static_range(K):
        source = time - (K - 1 - tap)
        in_span = present & (source >= 0)
        carried = present & (source < 0)
        place = tl.load(offsets_ptr + tl.maximum(source, 0), mask=in_span, other=0) + span
        new = tl.load(
            x_ptr + place[:, None] * x_stride + channels[None, :], mask=in_span[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        # Carried inputs are kept oldest first; the newest, K − 2, is that of time −1.
        kept = tl.load(
            state_ptr + (row * (K - 1) + tl.minimum(source, -1) + K - 1)[:, None] * E + channels[None, :],
            mask=carried[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = tl.load(weight_ptr + tap * E + channels, mask=inside, other=0.0)
        out += (new + kept) * weight[None, :]
    out += tl.load(bias_ptr + channels, mask=inside, other=0.0)[None, :]
    out = out / (1.0 + tl.exp(-out))
    tl.store(
        out_ptr + places[:, None] * E + channels[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=present[:, None] & inside[None, :],
    )


@triton.jit
def carry_spans(
    x_ptr,  # [T, E]
    state_ptr,  # [rows, K − 1, E]
    rows_ptr,
    lengths_ptr,
    offsets_ptr,
    x_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The last K − 1 inputs of one span take their row's places; a short span's stand behind what was there."""
    span = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = channels < E
    length = tl.load(lengths_ptr + span)
    own = state_ptr + tl.load(rows_ptr + span) * (K - 1) * E + channels
    # Oldest first: what is read lies behind what is written, since a span has at least one position.
    for place in tl.static_range(K - 1):
        time = length - (K - 1) + place
        if time >= 0:
            value = tl.load(x_ptr + (tl.load(offsets_ptr + time) + span) * x_stride + channels, mask=inside, other=0.0)
            tl.store(own + place * E, value, mask=inside)
        else:
            value = tl.load(own + (length + place) * E, mask=inside, other=0.0)
            tl.store(own + place * E, value, mask=inside)


def causal_conv(
    x: Tensor, state: Tensor, spans: Spans, weight: Tensor, bias: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """ops.conv.causal_conv: SiLU(b + Σₖ wₖ · x_{t−K+1+k}) per channel, in fp32; rows carry their last K − 1 inputs.

    x: [T, E] packed, the channels of a position side by side (positions need not be); state: [rows, K − 1, E] in x's
    dtype (updated in place); weight: [K, E], bias: [E] fp32 → [T, E] in `out_dtype`. Raises ValueError where channels
    are not side by side.
    """
    packed, x_stride = PackedSpans.of(spans), position_stride(x)
    total, channels = x.shape
    taps = weight.shape[0]
    out = torch.empty(total, channels, dtype=out_dtype, device=x.device)
    launch(
        convolve_spans, (blocks(channels, CONV_CHANNELS), blocks(total, CONV_POSITIONS)),
        x, state, weight, bias, out, packed.rows, packed.offsets, packed.span_of, packed.time_of,
        total, x_stride,
        E=channels, K=taps, BLOCK_T=CONV_POSITIONS, BLOCK_E=CONV_CHANNELS, num_warps=CONV_WARPS,
    )  # fmt: skip
    carry(x, state, spans)
    return out


def carry(x: Tensor, state: Tensor, spans: Spans) -> None:
    """The last K − 1 inputs of each span take the place of what its row carried, in [rows, K − 1, E] `state`."""
    packed, channels = PackedSpans.of(spans), x.shape[1]
    launch(
        carry_spans, (blocks(channels, CARRY_CHANNELS), len(packed)),
        x, state, packed.rows, packed.lengths, packed.offsets, position_stride(x),
        E=channels, K=state.shape[1] + 1, BLOCK_E=CARRY_CHANNELS, num_warps=CARRY_WARPS,
    )  # fmt: skip
