"""Every kernel with the constants that the official models give it: what is compiled ahead of time, and tested so.

Nothing is written down twice: the ops themselves are called on tensors without memory, shaped as a step of the model
shapes them, and what they would launch is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, pairwise

import torch
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE, AttentionConfig, Mamba2Config, ModelConfig, StageConfig, official_names
from hnet_runtime.ops.drawing import NUMBERS
from hnet_runtime.ops.triton.attention import decode_attention, rotate_and_keep
from hnet_runtime.ops.triton.boundary import descend_step, park_step
from hnet_runtime.ops.triton.conv import conv_step
from hnet_runtime.ops.triton.drawing import draw_step
from hnet_runtime.ops.triton.ema import ema_kept, ema_step
from hnet_runtime.ops.triton.entry import enter_step, resume_step, surface_step
from hnet_runtime.ops.triton.launching import Launch, recording
from hnet_runtime.ops.triton.norm import add_rms_norm, gated_norm_step
from hnet_runtime.ops.triton.places import last_places, next_places
from hnet_runtime.ops.triton.router import router_step
from hnet_runtime.ops.triton.ssm import ssm_step
from hnet_runtime.ops.triton.swiglu import swiglu

DTYPES = (torch.bfloat16, torch.float32)
ROWS, MAX_POSITIONS = 64, 32768
"""Rows of the step that is looked at (but for compaction they are no constant of any kernel), and a row's positions."""

Launches = Callable[[ModelConfig, torch.dtype], list[Launch]]


def step_launches(config: ModelConfig, dtype: torch.dtype) -> list[Launch]:
    """What one decoding step of a model launches, each kernel once for each set of constants.

    dtype: the model's, fp32 or bf16.
    """
    with recording() as launches:
        for stage in config.stages:
            _run(stage, dtype)
        _between(config.stages, dtype)
        _draw(dtype)
    return list(distinct(launches))


def launches_by_origin() -> dict[str, Launches]:
    """Where launches come from: a step, and prefill if its kernels are there."""
    origins: dict[str, Launches] = {"step": step_launches}
    if find_spec("hnet_runtime.ops.triton.registry_prefill") is not None:
        origins["prefill"] = import_module("hnet_runtime.ops.triton.registry_prefill").prefill_launches
    return origins


def every_launch() -> list[Launch]:
    """Of all six official models in both dtypes, each kernel once for each set of constants."""
    models = [ModelConfig.official(name) for name in official_names()]
    return list(
        distinct(
            chain.from_iterable(
                origin(model, dtype) for origin in launches_by_origin().values() for dtype in DTYPES for model in models
            )
        )
    )


def distinct(launches: Iterable[Launch]) -> Iterator[Launch]:
    """Launches that one compiled kernel cannot serve: the first of each kind."""
    seen = set()
    for each in launches:
        if each.key not in seen:
            seen.add(each.key)
            yield each


def _run(stage: StageConfig, dtype: torch.dtype) -> None:
    layers = [layer for stack in stage.stacks for layer in stack.layers]
    mixers = {layer.mixer for layer in layers}
    h, stream = _empty(ROWS, stage.d_model, dtype=dtype), _empty(ROWS, stage.d_model)
    for begins in (False, True):
        add_rms_norm(h, stream, _empty(stage.d_model), begins)
    _places(stage)
    if stage.mamba2 is not None and "mamba2" in mixers:
        _mamba2(stage.mamba2, dtype)
    if stage.attention is not None and "attention" in mixers:
        _attention(stage.attention, dtype)
    if any(layer.has_mlp for layer in layers):
        swiglu(_empty(ROWS, 2 * stage.d_mlp, dtype=dtype))
    if not stage.is_main:
        square = _empty(stage.d_model, stage.d_model)
        flags = _empty(ROWS, dtype=torch.bool)
        router_step(h, _empty(ROWS, stage.d_model, dtype=dtype), _index(), _index(), square, square)
        # A chunk's output is a view of the first channels of the next stage's.
        z = _empty(ROWS, 2 * stage.d_model, dtype=dtype)[:, : stage.d_model]
        ema_step(z, _index(), _empty(ROWS), flags, stream, _index(), stream)
        ema_kept(stream, _index(), stream, dtype)


def _between(stages: Sequence[StageConfig], dtype: torch.dtype) -> None:
    """What leads from bytes to a stage, and from one to the next."""
    said, index = _empty(ROWS), _index()
    enter_step(index, index, index, _empty(VOCAB_SIZE, stages[0].d_model, dtype=dtype), said)
    for stage, inner in pairwise(stages):
        h, pad = _empty(ROWS, stage.d_model, dtype=dtype), None
        if inner.pad_width:
            pad = _empty(inner.pad_width, dtype=dtype)
        descend_step(said, index, h, pad, said)
        park_step(said, index, h, h, said, said)
        resume_step(index, h, pad, said)
        surface_step(index, h, said)


def _draw(dtype: torch.dtype) -> None:
    logits, index = _empty(ROWS, VOCAB_SIZE), _index()
    numbers = _empty(len(NUMBERS), ROWS, dtype=torch.float64)
    given, masks = (_empty(ROWS, *shape, dtype=torch.bool) for shape in ((2, VOCAB_SIZE), (VOCAB_SIZE,)))
    for places in (index, None):
        projected = _empty(ROWS, VOCAB_SIZE, dtype=dtype)
        draw_step(projected, index, places, numbers, given, masks, index, index, index, logits, _empty(ROWS))


def _places(stage: StageConfig) -> None:
    table, capacity = _kept(stage.attention)
    for find in (next_places, last_places):
        find(_index(), _index(), table, capacity)


def _kept(config: AttentionConfig | None) -> tuple[Tensor | None, int | None]:
    """Where a stage's keys are: the table of pages, or the capacity of a ring."""
    if config is None:
        return None, None
    if config.window >= 0:
        return None, config.window + 1
    return _empty(ROWS, MAX_POSITIONS // 64, dtype=torch.int64), None


def _mamba2(config: Mamba2Config, dtype: torch.dtype) -> None:
    widths = [config.d_inner, config.conv_channels, config.num_heads]
    z, xbc, dt = torch.split(_empty(ROWS, config.in_proj_width, dtype=dtype), widths, dim=-1)
    taps, channels, heads = config.d_conv, config.conv_channels, config.num_heads
    state = _empty(ROWS, taps - 1, channels, dtype=dtype)
    conv_step(xbc, state, _index(), _empty(taps, channels), _empty(channels))
    ssm = _empty(ROWS, heads, config.head_dim, config.d_state)
    mixed = _empty(ROWS, channels, dtype=dtype)
    ssm_step(mixed, dt, _empty(heads), _empty(heads), _empty(heads), ssm, _index())
    gated_norm_step(_empty(ROWS, config.d_inner, dtype=dtype), z, _empty(config.d_inner))


def _attention(config: AttentionConfig, dtype: torch.dtype) -> None:
    heads, head_dim = config.num_heads, config.head_dim
    table, capacity = _kept(config)
    store = _empty(ROWS * capacity if capacity else MAX_POSITIONS, heads, head_dim, dtype=dtype)
    rotate_and_keep(_empty(ROWS, 3, heads, head_dim, dtype=dtype), _index(), _index(), store, store, config.rotary_dim)
    q = _empty(ROWS, heads, head_dim, dtype=dtype)
    decode_attention(q, store, store, _index(), _index(), table, config.window, capacity, MAX_POSITIONS)


def _index() -> Tensor:
    return _empty(ROWS, dtype=torch.int64)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
