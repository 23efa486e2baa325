"""Smoothing: the exponential moving average that carries chunk outputs back to their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.spans import Spans

P_MIN, P_MAX = 1e-4, 1.0 - 1e-4  # the reference's clamp of p


def smooth(z: Tensor, p: Tensor, memory: Tensor, spans: Spans) -> Tensor:
    """z̄ ← P ẑ + (1 − P) z̄ at each chunk, sequential in time, in fp32 (paper, equation 5).

    It starts from 0, so that the first chunk enters as 0.9999 · ẑ.

    z: [C, D] chunk outputs and p: [C] the probabilities that opened them, packed by `spans` of the
    chunks' stage, memory: [rows, D] fp32 (updated in place) → z̄: [C, D] fp32.
    """
    weight = p.clamp(P_MIN, P_MAX).unsqueeze(-1)
    smoothed = z.float() * weight
    carried = memory.index_select(0, spans.row_index)
    keep = 1.0 - weight
    for time in range(spans.longest):
        running, begin = int(spans.counts[time]), int(spans.offsets[time])
        here = smoothed[begin : begin + running]
        carried[:running].mul_(keep[begin : begin + running]).add_(here)
        here.copy_(carried[:running])
    memory.index_copy_(0, spans.row_index, carried)
    return smoothed


def ema_step(
    z: Tensor, place: Tensor, p: Tensor, opened: Tensor, memory: Tensor, rows: Tensor, residual: Tensor
) -> Tensor:
    """`smooth` of one position of each row that opened a chunk, with its residual: what a decoder begins with. The
    others keep their average as it is.

    z: [B', ≥ D] chunk outputs in the model's dtype, place: [B] int64, which of them is a row's own (any valid place
    where it opened none), p: [B] fp32, opened: [B] bool, memory: [rows, D] fp32 (updated in place), rows: [B] int64,
    residual: [B, D] fp32 → z̄ + residual: [B, D] in z's dtype.
    """
    weight = p.clamp(P_MIN, P_MAX).unsqueeze(-1)
    before = memory.index_select(0, rows)
    chunk = z[:, : memory.shape[1]].index_select(0, place).float()
    # A row that opened none may be handed anything, what is not finite too: it is chosen away, not multiplied.
    smoothed = torch.where(opened.unsqueeze(-1), before * (1.0 - weight) + chunk * weight, before)
    memory.index_copy_(0, rows, smoothed)
    return (smoothed + residual).to(z.dtype)


def ema_kept(memory: Tensor, rows: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """What `ema_step` gives rows that opened no chunk, where none of them did.

    memory: [rows, D] fp32, rows: [B] int64, residual: [B, D] fp32 → z̄ + residual: [B, D] in `dtype`.
    """
    return (memory.index_select(0, rows) + residual).to(dtype)
