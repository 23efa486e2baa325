"""The kernels of prefill with the constants a model gives them, for whoever compiles them ahead of time.

Nothing runs: the ops are called on tensors without memory and what they would launch is listed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.config import AttentionConfig, Mamba2Config, ModelConfig, StageConfig
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton.conv_spans import causal_conv
from hnet_runtime.ops.triton.launching import Launch, recording
from hnet_runtime.ops.triton.prefill_attention import Keys, attend, rotate
from hnet_runtime.ops.triton.registry import distinct
from hnet_runtime.ops.triton.scan import selective_scan
from hnet_runtime.ops.triton.smooth import smooth

_ROWS, _PAGES = 8, 16
_META = torch.device("meta")


def prefill_launches(config: ModelConfig, dtype: torch.dtype) -> list[Launch]:
    """What prefilling two prompts with this model launches, each kernel once for each set of constants.

    dtype: the model's, fp32 or bf16.
    """
    spans, _ = Spans.of([1, 2], [0, 64], [192, 64], _META)
    with recording() as launches:
        for stage in config.stages:
            _run(stage, spans, dtype)
    return list(distinct(launches))


def _run(stage: StageConfig, spans: Spans, dtype: torch.dtype) -> None:
    mixers = {layer.mixer for stack in stage.stacks for layer in stack.layers}
    if stage.mamba2 is not None and "mamba2" in mixers:
        _mamba2(stage.mamba2, spans, dtype)
    if stage.attention is not None and "attention" in mixers:
        _attention(stage.attention, spans, dtype)
    if not stage.is_main:
        # A chunk's output is a view of the first channels of the next stage's.
        z = _empty(spans.total, 2 * stage.d_model, dtype=dtype)[:, : stage.d_model]
        smooth(z, _empty(spans.total), _empty(_ROWS, stage.d_model), spans)


def _mamba2(config: Mamba2Config, spans: Spans, dtype: torch.dtype) -> None:
    heads, channels, states = config.num_heads, config.conv_channels, config.d_state
    projected = _empty(spans.total, config.in_proj_width, dtype=dtype)
    x = projected[:, config.d_inner : config.d_inner + channels]
    state = _empty(_ROWS, config.d_conv - 1, channels, dtype=dtype)
    mixed = causal_conv(x, state, spans, _empty(config.d_conv, channels), _empty(channels), dtype)
    inner, b, c = torch.split(mixed, [config.d_inner, states, states], dim=-1)
    selective_scan(
        inner.view(spans.total, heads, config.head_dim),
        _empty(spans.total, heads),
        _empty(heads),
        b,
        c,
        _empty(heads),
        _empty(_ROWS, heads, config.head_dim, states),
        spans,
        dtype,
    )


def _attention(config: AttentionConfig, spans: Spans, dtype: torch.dtype) -> None:
    shape = (config.num_heads, config.head_dim)
    q, k, v = _empty(spans.total, 3, *shape, dtype=dtype).unbind(1)
    if config.rotary_dim:
        table = tuple(_empty(spans.total, 1, config.rotary_dim // 2) for _ in range(2))
        q, k = rotate(q, (table[0], table[1])), rotate(k, (table[0], table[1]))
    if config.window >= 0:
        keys = Keys(spans, config.window, capacity=config.window + 1)
        slots = _ROWS * (config.window + 1)
    else:
        keys = Keys(spans, config.window, table=_empty(_ROWS, _PAGES, dtype=torch.int64))
        slots = _ROWS * _PAGES * 64
    k_store, v_store = (_empty(slots, *shape, dtype=dtype) for _ in range(2))
    attend(q, k, v, k_store, v_store, keys)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)
