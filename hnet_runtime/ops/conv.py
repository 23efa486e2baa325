"""The short causal depthwise convolution before Mamba-2's recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.activation import silu
from hnet_runtime.ops.spans import Spans


def causal_conv(
    x: Tensor, state: Tensor, spans: Spans, weight: Tensor, bias: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """SiLU(b + Σₖ wₖ · x_{t−K+1+k}) per channel, in fp32; the last K − 1 inputs are carried in `state`.

    x: [T, E] packed, state: [rows, K − 1, E] (updated in place), weight: [K, E] fp32,
    bias: [E] fp32 → [T, E] in `out_dtype`.
    """
    depth = state.shape[1]
    carried = state.index_select(0, spans.row_index)  # [R, K−1, E]
    if spans.is_step:
        taps = torch.cat((carried, x.unsqueeze(1)), 1)
        kept = taps[:, 1:]
    else:
        window, carry = spans.history_index(depth)
        source = torch.cat((carried.flatten(0, 1), x))
        taps, kept = source[window], source[carry]
    state.index_copy_(0, spans.row_index, kept)
    return silu((taps.float() * weight).sum(1) + bias).to(out_dtype)


def conv_step(x: Tensor, state: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv` of one position of each row, rounded; `state` is shifted by it.

    x: [B, E] in the model's dtype (a view with any row stride), state: [rows, K − 1, E] in that dtype (updated in
    place), rows: [B] int64, weight: [K, E] fp32, bias: [E] fp32 → [B, E] in x's dtype.
    """
    taps = torch.cat((state.index_select(0, rows), x.unsqueeze(1)), 1)
    state.index_copy_(0, rows, taps[:, 1:])
    return silu((taps.float() * weight).sum(1) + bias).to(x.dtype)
