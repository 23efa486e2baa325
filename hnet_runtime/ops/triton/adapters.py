"""Ops of prefill on other projects' kernels, for the spans where those compute the same; on ours for the rest.

None of this has run on a GPU yet: the tests call stand-ins with the libraries' signatures, which check what they are
given and answer as documented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.ops.attention import SlotsOf
from hnet_runtime.ops.prefill import Op, PrefillOps
from hnet_runtime.ops.spans import Ints, Spans
from hnet_runtime.ops.triton import conv_spans, prefill_attention
from hnet_runtime.ops.triton.libraries import CAUSAL_CONV1D, FLASH_ATTN, Choice, function_of
from hnet_runtime.ops.triton.prefill_attention import Keys
from hnet_runtime.ops.triton.scan import selective_scan
from hnet_runtime.ops.triton.smooth import smooth


def prefill_ops(choices: Mapping[Op, Choice]) -> PrefillOps:
    """The ops that `libraries.choose` chose for a CUDA device with Triton."""
    with_conv1d = choices["convolution"].name == CAUSAL_CONV1D.name
    with_flash = choices["attention"].name == FLASH_ATTN.name
    return PrefillOps(
        forms={op: choice.name for op, choice in choices.items()},
        selective_scan=selective_scan,
        causal_conv=conv_with(function_of(CAUSAL_CONV1D)) if with_conv1d else conv_spans.causal_conv,
        rotate=prefill_attention.rotate,
        keys=_keys,
        attend=attend_with(function_of(FLASH_ATTN)) if with_flash else prefill_attention.attend,
        smooth=smooth,
    )


def _keys(spans: Spans, window: int, slots_of: SlotsOf, table: Ints | None, capacity: int | None) -> Keys:
    del slots_of  # kernels find slots themselves
    if table is None:
        return Keys(spans, window, capacity=capacity)
    # Rows past those that run are not brought over; a row's pages all are, since the kernels know the table's stride.
    return Keys(spans, window, table=spans.tensor(table[: spans.rows.max() + 1]))


# ── causal-conv1d ──────────────────────────────────────────────────────────────────────────────────


def conv_with(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """conv_spans.causal_conv on `causal_conv1d_fn`, where all spans have one length.

    It takes x as (batch, E, length) with channels side by side, which spans of one length are, and initial states
    as (batch, E, K − 1) in x's dtype; it sums in fp32 and rounds to x's dtype once, as blocks.py does. Its vector
    loads ask for channels and strides in eights and 16-byte addresses. What rows carry on is ours to keep: one
    kernel for spans of any length.
    """

    def causal_conv(
        x: Tensor, state: Tensor, spans: Spans, weight: Tensor, bias: Tensor, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if not takes_conv(x, state, spans, weight):
            return conv_spans.causal_conv(x, state, spans, weight, bias, out_dtype)
        carried = state.index_select(0, spans.row_index).transpose(1, 2)  # [R, E, K − 1]
        batch = x.view(spans.longest, len(spans), -1).permute(1, 2, 0)  # [R, E, length]
        out = function(batch, weight.t(), bias, initial_states=carried, activation="silu")
        conv_spans.carry(x, state, spans)
        packed: Tensor = out.permute(2, 0, 1).reshape(x.shape)
        return packed.to(out_dtype)

    return causal_conv


def takes_conv(x: Tensor, state: Tensor, spans: Spans, weight: Tensor) -> bool:
    """Whether causal-conv1d computes these spans."""
    taps, channels = weight.shape
    return (
        bool((spans.lengths == spans.longest).all())
        and 2 <= taps <= 4
        and channels % 8 == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and state.dtype == x.dtype
    )


# ── flash-attn ─────────────────────────────────────────────────────────────────────────────────────


def attend_with(function: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Keys], Tensor]:
    """prefill_attention.attend on `flash_attn_varlen_func`, where all spans begin at position 0.

    Such spans see no keys but their own, so that neither pages nor rings are read: flash-attn's pages are multiples of
    256 positions, and it knows no rings. A window (w, 0) is inclusive, w positions before a query and itself. It wants
    span after span. The weights of a sum are rounded to the model's dtype, as in the released model; ours are not.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, k_store: Tensor, v_store: Tensor, keys: Keys) -> Tensor:
        spans = keys.spans
        if not takes_attention(q, spans):
            return prefill_attention.attend(q, k, v, k_store, v_store, keys)
        order, ends = _by_span(spans)
        found = function(
            *(each if len(spans) == 1 else each[order] for each in (q, k, v)),
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=spans.longest,
            max_seqlen_k=spans.longest,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
            window_size=(keys.window, 0) if keys.window >= 0 else (-1, -1),
        )
        prefill_attention.keep(k, v, k_store, v_store, keys)
        if len(spans) == 1:
            return torch.as_tensor(found)
        return torch.empty_like(found).index_copy_(0, order, found)

    return attend


def takes_attention(q: Tensor, spans: Spans) -> bool:
    """Whether flash-attn computes these spans."""
    head_dim = q.shape[-1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and not bool(spans.starts.any())
    )


_ORDERS: WeakKeyDictionary[Spans, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def _by_span(spans: Spans) -> tuple[Tensor, Tensor]:
    """[T] packed places span after span, and [R + 1] int32 where each span begins among them."""
    found = _ORDERS.get(spans)
    if found is None:
        order = np.lexsort((spans.time_of, spans.span_of))
        ends = np.concatenate([[0], np.cumsum(spans.lengths)]).astype(np.int32)
        found = _ORDERS[spans] = spans.tensor(order), spans.tensor(ends)
    return found
