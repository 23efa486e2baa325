"""The operations of whole windows at once, with gradients: the runtime's blocks run on these while they learn.

Knows the signatures of `PrefillOps`, which say what each computes; a window begins with nothing, so the memory of rows
that they are handed is neither read nor written. Times run in parallel: the recurrence of Mamba-2 as products of blocks
(arXiv 2405.21060, section 6), the smoothing as one product with the weights of its average (arXiv 2507.07955, equation
5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.ops.ema import P_MAX, P_MIN
from hnet_runtime.ops.prefill import OPS, PrefillOps
from hnet_runtime.ops.rotary import rotate
from hnet_runtime.ops.spans import Ints, Spans
from training import scan

SCAN_BLOCK = 32
"""Positions that the scan takes at once: its quadratic part grows with it, the number of states it keeps shrinks."""


def parallel_ops() -> PrefillOps:
    """The form of prefill that training runs on."""
    return PrefillOps(
        forms=dict.fromkeys(OPS, "torch"),
        selective_scan=selective_scan,
        causal_conv=causal_conv,
        rotate=rotate,
        keys=_keys,
        attend=attend,
        smooth=smooth,
    )


class Grid:
    """Packed spans as [longest, R]: time, then span. Places past a span's end hold what is never looked at: every
    operation here is causal."""

    def __init__(self, spans: Spans) -> None:
        self.times, self.spans = spans.longest, len(spans)
        self.whole = bool((spans.lengths == spans.longest).all())
        if not self.whole:
            self._places = spans.padded_index.t().reshape(-1)
            self._back = spans.tensor(spans.time_of * len(spans) + spans.span_of)

    def spread(self, x: Tensor) -> Tensor:
        """[T, ...] → [longest, R, ...]."""
        grid = x if self.whole else x.index_select(0, self._places)
        return grid.reshape(self.times, self.spans, *x.shape[1:])

    def pack(self, x: Tensor) -> Tensor:
        """[longest, R, ...] → [T, ...]."""
        flat = x.reshape(self.times * self.spans, *x.shape[2:])
        return flat if self.whole else flat.index_select(0, self._back)


def grid_of(spans: Spans) -> Grid:
    """The grid of `spans`, made once."""
    grid: Grid | None = spans.__dict__.get("grid")
    if grid is None:
        grid = spans.__dict__["grid"] = Grid(spans)
    return grid


def causal_conv(x: Tensor, memory: Tensor, spans: Spans, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """SiLU of the depthwise convolution. x: [T, E], weight: [K, E], bias: [E] → [T, E] in `dtype`."""
    del memory
    grid = grid_of(spans)
    out: Tensor = _CausalConv.apply(grid.spread(x.float()), weight, bias)  # type: ignore[no-untyped-call]
    return grid.pack(out).to(dtype)


class _CausalConv(torch.autograd.Function):
    """x: [times, R, E], weight: [K, E], bias: [E] → [times, R, E]; all fp32."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = len(weight)
        total = torch.addcmul(bias, x, weight[-1])
        for back in range(1, min(taps, len(x))):
            total[back:].addcmul_(x[:-back], weight[-1 - back])
        context.save_for_backward(x, weight, total)
        return F.silu(total)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        x, weight, total = context.saved_tensors
        inner = torch.ops.aten.silu_backward(gradient, total)
        x_gradient = inner * weight[-1]
        weight_gradient = torch.zeros_like(weight)
        weight_gradient[-1] = (inner * x).sum((0, 1))
        for back in range(1, min(len(weight), len(x))):
            x_gradient[:-back].addcmul_(inner[back:], weight[-1 - back])
            weight_gradient[-1 - back] = (inner[back:] * x[:-back]).sum((0, 1))
        return x_gradient, weight_gradient, inner.sum((0, 1))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    memory: Tensor,
    spans: Spans,
    dtype: torch.dtype,
) -> Tensor:
    """Mamba-2's recurrence S_t = exp(Δ_t A) S_{t−1} + Δ_t x_t ⊗ B_t, y_t = S_t C_t + D x_t.

    x: [T, H, P], dt: [T, H] fp32, a, d: [H] fp32, b, c: [T, N] → [T, H, P] in `dtype`.
    """
    del memory
    grid = grid_of(spans)
    on_grid = [grid.spread(values.float()) for values in (x, dt, b, c)]
    form = (
        scan.scan if x.device.type == "cpu" and x.shape[-1] == scan.HEAD_DIM and scan.is_available() else blocked_scan
    )
    y = form(on_grid[0], on_grid[1], a, on_grid[2], on_grid[3])
    return (grid.pack(y) + d.unsqueeze(-1) * x.float()).to(dtype).contiguous()


def blocked_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence without its skip, in plain torch. x: [T, R, H, P], dt: [T, R, H], a: [H], b, c: [T, R, N], all
    fp32 → [T, R, H, P].

    Within a block of positions it is attention with decays for weights; between blocks states are carried by one
    product with the decays of all pairs of blocks (arXiv 2405.21060, section 6).
    """
    times, rows, heads, _ = x.shape
    blocks = -(-times // SCAN_BLOCK)
    padding = blocks * SCAN_BLOCK - times

    def blocked(values: Tensor) -> Tensor:
        """[T, ...] → [blocks, block, R, ...], zeros at the end."""
        if padding:
            values = torch.cat((values, values.new_zeros(padding, *values.shape[1:])))
        return values.view(blocks, SCAN_BLOCK, *values.shape[1:])

    x_blocks, dt_blocks = blocked(x), blocked(dt)  # [n, L, R, H, P], [n, L, R, H]
    b_blocks, c_blocks = blocked(b).transpose(1, 2), blocked(c).transpose(1, 2)  # [n, R, L, N]
    driven = (x_blocks * dt_blocks.unsqueeze(-1)).permute(0, 2, 3, 1, 4)  # [n, R, H, L, P]
    log_decay = (dt_blocks * a).permute(0, 2, 3, 1).cumsum(-1)  # [n, R, H, L]

    # Within blocks.
    after = torch.ones(SCAN_BLOCK, SCAN_BLOCK, dtype=torch.bool, device=x.device).triu(1)
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(after, float("-inf")).exp()
    scores = (c_blocks @ b_blocks.transpose(-1, -2)).unsqueeze(2) * decay  # [n, R, H, L, L]
    y = scores @ driven  # [n, R, H, L, P]

    # What each block leaves, carried to the beginning of every later one.
    total = log_decay[..., -1]  # [n, R, H]
    left = (driven * (total.unsqueeze(-1) - log_decay).exp().unsqueeze(-1)).transpose(-1, -2) @ b_blocks.unsqueeze(2)
    carried = _carry(total, left)  # [n, R, H, P, N]
    y = y + (c_blocks.unsqueeze(2) @ carried.transpose(-1, -2)) * log_decay.exp().unsqueeze(-1)
    return y.permute(0, 3, 1, 2, 4).reshape(blocks * SCAN_BLOCK, rows, heads, -1)[:times]


def _carry(total: Tensor, left: Tensor) -> Tensor:
    """The state at the beginning of each block. total: [n, R, H] log decays, left: [n, R, H, P, N] → the same shape.

    Logarithms are summed in fp64: over a whole window they grow to thousands, and differences of neighbours count.
    """
    blocks = len(total)
    sums = F.pad(total.double().cumsum(0), (0, 0, 0, 0, 1, 0))  # [n + 1, R, H] decay before each block
    gap = sums[:-1].unsqueeze(1) - sums[1:].unsqueeze(0)  # [to, from, R, H]
    not_before = torch.ones(blocks, blocks, dtype=torch.bool, device=left.device).triu()
    weights = gap.masked_fill(not_before[..., None, None], float("-inf")).exp().to(left.dtype)
    return torch.einsum("tfrh,frhk->trhk", weights, left.flatten(3)).view_as(left)


def _keys(spans: Spans, window: int, slots_of: Any, table: Ints | None, capacity: int | None) -> tuple[Spans, int]:
    del slots_of, table, capacity
    return spans, window


def attend(q: Tensor, k: Tensor, v: Tensor, k_memory: Tensor, v_memory: Tensor, keys: tuple[Spans, int]) -> Tensor:
    """Causal attention within each span, in its window. q, k, v: [T, H, P] → [T, H, P]."""
    del k_memory, v_memory
    spans, window = keys
    grid = grid_of(spans)
    q, k, v = (grid.spread(values).permute(1, 2, 0, 3) for values in (q, k, v))  # [R, H, times, P]
    if 0 <= window < grid.times - 1:
        distance = torch.arange(grid.times, device=q.device)
        distance = distance.unsqueeze(1) - distance
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= window))
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return grid.pack(out.permute(2, 0, 1, 3)).contiguous()


def smooth(z: Tensor, p: Tensor, memory: Tensor, spans: Spans) -> Tensor:
    """z̄_c = Σ_{j ≤ c} P_j Π_{j < i ≤ c} (1 − P_i) ẑ_j, where z̄ ← P ẑ + (1 − P) z̄ leads.

    z: [C, D], p: [C] → [C, D] fp32. The logarithms of the products are summed in fp64.
    """
    del memory
    grid = grid_of(spans)
    weight = grid.spread(p.float().clamp(P_MIN, P_MAX)).t()  # [R, times]
    kept = torch.log1p(-weight.double()).cumsum(1)
    after = torch.ones(grid.times, grid.times, dtype=torch.bool, device=z.device).triu(1)
    average = (kept.unsqueeze(2) - kept.unsqueeze(1)).masked_fill(after, float("-inf")).exp().float()
    average = average * weight.unsqueeze(1)  # [R, to, from]
    smoothed = average @ grid.spread(z.float()).transpose(0, 1)
    return grid.pack(smoothed.transpose(0, 1))


def equal_spans(count: int, length: int, device: torch.device) -> Spans:
    """`count` windows of `length` positions, each from its beginning."""
    rows = np.arange(count, dtype=np.int64)
    return Spans(rows, np.zeros_like(rows), np.full_like(rows, length), device)
