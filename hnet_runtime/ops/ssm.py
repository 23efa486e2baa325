"""The Mamba-2 recurrence, sequential in time."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.activation import softplus
from hnet_runtime.ops.spans import Spans

_CHUNK_FLOATS = 1 << 22  # states kept at once while a span is walked
_CACHE_FLOATS = 1 << 17  # states of as many rows as a core's cache holds step together


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    spans: Spans,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """S_t = exp(dt_t A) S_{t−1} + dt_t x_t ⊗ B_t;  y_t = S_t C_t + D x_t   (Mamba-2, one group).

    x: [T, H, P], b, c: [T, N] fp32 or bf16, dt: [T, H] (after softplus), a: [H] (negative), d: [H],
    state: [rows, H, P, N] (updated in place), all fp32 → y: [T, H, P] in `out_dtype`, from the
    unrounded new state; everything between is fp32.
    """
    x, b, c = x.float(), b.float(), c.float()
    decay = torch.exp(dt * a)[:, :, None, None]  # [T, H, 1, 1]
    scaled = (dt.unsqueeze(-1) * x).unsqueeze(-1)  # [T, H, P, 1]
    y = _walk(scaled, decay, b[:, None, None, :], c[:, None, None, :], state, spans)
    return (y + d[:, None] * x).to(out_dtype)


def _walk(scaled: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, spans: Spans) -> Tensor:
    if spans.is_step:
        return _step(scaled, decay, b, c, state, spans)
    carried = state.index_select(0, spans.row_index)  # [R, H, P, N]
    y = scaled.new_empty(scaled.shape[:3])
    per_position = carried[0].numel()
    offsets, counts = spans.offsets, spans.counts
    time = 0
    while time < spans.longest:
        # As many times at once as fit: their inputs in one product, then step by step in place.
        until = time + 1
        while until < spans.longest and (offsets[until + 1] - offsets[time]) * per_position <= _CHUNK_FLOATS:
            until += 1
        begin, end = int(offsets[time]), int(offsets[until])
        states = scaled[begin:end] * b[begin:end]  # [n, H, P, N]
        for step in range(time, until):
            running = int(counts[step])
            at = int(offsets[step]) - begin
            here = states[at : at + running]
            before = carried[:running]
            before.mul_(decay[begin + at : begin + at + running]).add_(here)
            here.copy_(before)
        y[begin:end] = (states * c[begin:end]).sum(-1)
        time = until
    state.index_copy_(0, spans.row_index, carried)
    return y


def _step(scaled: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, spans: Spans) -> Tensor:
    """One time of every row, as many rows at once as the cache holds."""
    y = scaled.new_empty(scaled.shape[:3])
    rows_at_once = max(1, _CACHE_FLOATS // state[0].numel())
    for begin in range(0, len(spans), rows_at_once):
        part = slice(begin, min(begin + rows_at_once, len(spans)))
        new = scaled[part] * b[part]
        if (run := spans.consecutive(part)) is not None:
            here = state[run]  # consecutive rows are updated where they lie
            here.mul_(decay[part]).add_(new)
        else:
            here = state.index_select(0, spans.row_index[part]).mul_(decay[part]).add_(new)
            state.index_copy_(0, spans.row_index[part], here)
        y[part] = torch.mul(here, c[part], out=new).sum(-1)
    return y


def ssm_step(xbc: Tensor, dt: Tensor, a: Tensor, dt_bias: Tensor, d: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    """`selective_scan` of one position of each row, from what the convolution gave and the raw dt, rounded.

    xbc: [B, H·P + 2N] = [x, B, C] and dt: [B, H] (before bias and softplus; a view with any row stride) in the model's
    dtype, a (negative), dt_bias, d: [H] fp32, state: [rows, H, P, N] fp32 (updated in place), rows: [B] int64
    → y: [B, H·P] in xbc's dtype, from the unrounded new state.
    """
    _, heads, head_dim, states = state.shape
    x, b, c = torch.split(xbc.float(), [heads * head_dim, states, states], dim=-1)
    x = x.reshape(-1, heads, head_dim)
    step = softplus(dt.float() + dt_bias)  # [B, H]
    decay = torch.exp(step * a)[:, :, None, None]
    new = (step.unsqueeze(-1) * x).unsqueeze(-1) * b[:, None, None, :]  # [B, H, P, N]
    here = state.index_select(0, rows).mul_(decay).add_(new)
    state.index_copy_(0, rows, here)
    y = (here * c[:, None, None, :]).sum(-1) + d[:, None] * x
    return y.flatten(1).to(xbc.dtype)
