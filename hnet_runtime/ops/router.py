"""The router: does this position open a chunk of the next stage?"""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.linear import linear
from hnet_runtime.ops.spans import Spans

BOUNDARY_THRESHOLD = 0.5  # strictly above it; 0.5 itself, real in bf16, is no boundary
NORM_FLOOR = 1e-12  # what the released code's normalize() divides by at least


def boundary_probability(h: Tensor, memory: Tensor, spans: Spans, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """p = ½ (1 − cos(W_q h_prev, W_k h_now)); 1 at the first position of a sequence.

    The released weights project the previous vector with q and the current one with k,
    whereas the paper writes it the other way round (its equation 4). Everything is in fp32 but for
    one rounding: 1 − cos goes through the model's dtype, as in the released code. In bf16 that
    makes p = 0.5 exactly wherever |cos| is below 2⁻⁹, a tie that is no boundary; without
    it those positions would be decided by bits that the released model never sees.

    h: [T, D] packed, memory: [rows, D] each row's previous vector (updated in place),
    q_weight, k_weight: [D, D] fp32 → p: [T] fp32 in [0, 1].
    """
    carried = memory.index_select(0, spans.row_index)  # [R, D]
    previous = carried if spans.is_step else torch.cat((carried, h))[spans.predecessor]
    last = h if spans.is_step else h[spans.tensor(spans.last)]
    q = linear(previous.float(), q_weight)
    k = linear(h.float(), k_weight)
    p = probability(q, k, h.dtype)
    memory.index_copy_(0, spans.row_index, last)
    first = spans.tensor(spans.position_of == 0)
    return torch.where(first, torch.ones_like(p), p)


def probability(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """½ (1 − cos(q, k)), 1 − cos rounded to the model's dtype. q, k: [T, D] fp32 → [T] fp32."""
    cosine = (q * k).sum(-1) / (_norm(q) * _norm(k))
    return ((1.0 - cosine).to(dtype).float() / 2.0).clamp(0.0, 1.0)


def _norm(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum(-1)).clamp(min=NORM_FLOOR)


def router_step(
    h: Tensor, memory: Tensor, rows: Tensor, positions: Tensor, q_weight: Tensor, k_weight: Tensor
) -> Tensor:
    """`boundary_probability` of one position of each row; `memory` then holds h.

    h: [B, D] in the model's dtype, memory: [rows, D] in it (updated in place), rows, positions: [B] int64, of which
    position 0 is the first of a sequence, q_weight, k_weight: [D, D] fp32 → p: [B] fp32 in [0, 1].
    """
    q = linear(memory.index_select(0, rows).float(), q_weight)
    k = linear(h.float(), k_weight)
    memory.index_copy_(0, rows, h)
    return torch.where(positions == 0, 1.0, probability(q, k, h.dtype))
