"""Calls of other projects, by the signatures recorded from their sources, in plain torch.

They refuse what the real ones are documented to refuse and answer as documented, in fp32 with one rounding at the end.
causal-conv1d 1.7.0, flash-attn 2.8.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    batch, channels, _ = x.shape
    width = weight.shape[1]
    assert seq_idx is None
    assert not return_final_states
    assert final_states_out is None
    assert activation in ("silu", "swish")
    assert weight.shape == (channels, width)
    assert bias.shape == (channels,)
    assert bias.dtype == weight.dtype
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert x.stride(2) % 8 == x.stride(0) % 8 == channels % 8 == 0
    assert 2 <= width <= 4
    assert initial_states.shape == (batch, channels, width - 1)
    assert initial_states.stride(1) == 1
    assert initial_states.dtype == x.dtype
    taps = torch.cat((initial_states, x), -1).float()
    out = F.silu(F.conv1d(taps, weight.float().unsqueeze(1), bias.float(), groups=channels))
    return torch.empty_like(x).copy_(out)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert dropout_p == softcap == 0.0
    assert alibi_slopes is None
    assert block_table is None
    assert causal
    for tensor in (q, k, v):
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
    assert q.shape[-1] % 8 == 0
    for ends, longest, packed in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert int(ends[0]) == 0
        assert int(ends[-1]) == len(packed)
        assert int(ends.diff().max()) == longest
    out = torch.empty_like(q)
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        out[begin:end] = _attend(q[begin:end], k[begin:end], v[begin:end], softmax_scale, *window_size).to(q.dtype)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> Tensor:
    """Query i sees the keys of i − left … i + right, inclusive, and of them, being causal, none after i."""
    assert right in (0, -1)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))[None, :]
    hidden = (distance < 0) | ((distance > left) & torch.tensor(left >= 0))
    scores = torch.einsum("qhp,khp->hqk", q.float(), k.float()) * scale
    return torch.einsum("hqk,khp->qhp", scores.masked_fill(hidden, float("-inf")).softmax(-1), v.float())
