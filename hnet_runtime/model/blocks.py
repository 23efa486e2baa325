"""The blocks of an isotropic stack: pre-norm, a mixer, and an MLP where the layout has one.

Knows weights and one layer's state; nothing of stages, requests or batches beyond its Spans.
Roundings to the model's dtype stand where the released model has them; everything between is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hnet_runtime.config import AttentionConfig, LayerConfig, Mamba2Config, StageConfig
from hnet_runtime.ops.activation import softplus
from hnet_runtime.ops.linear import linear
from hnet_runtime.ops.norm import gated_rms_norm, rms_norm
from hnet_runtime.ops.prefill import PrefillOps
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.swiglu import swiglu
from hnet_runtime.state.arenas import AttentionState, LayerState, Mamba2State

TakeWeight = Callable[[str], Tensor]
"""Gives the tensor of a key below a layer, such as `norm1.weight`."""


@dataclass(frozen=True)
class StageContext:
    """What the layers of one stage share in one forward: what runs it, the spans, and for attention what `ops.keys`
    says of the keys and the rotary table."""

    ops: PrefillOps
    spans: Spans
    keys: Any
    rotary: tuple[Tensor, Tensor] | None


class Mamba2Mixer:
    """Mamba-2 with one group: in_proj → z, x, B, C, dt; conv; recurrence; gated norm; out_proj."""

    def __init__(self, config: Mamba2Config, take: TakeWeight) -> None:
        self.config = config
        self.in_proj = take("mixer.in_proj.weight")
        self.out_proj = take("mixer.out_proj.weight")
        self.conv_weight = take("mixer.conv1d.weight").squeeze(1).t().float().contiguous()  # [K, E]
        self.conv_bias = take("mixer.conv1d.bias").float()
        self.dt_bias = take("mixer.dt_bias").float()
        self.a = -torch.exp(take("mixer.A_log").float())
        self.d = take("mixer.D").float()
        self.norm = take("mixer.norm.weight").float()

    def __call__(self, x: Tensor, state: LayerState, context: StageContext) -> Tensor:
        """x: [T, D] → [T, D], both in the model's dtype."""
        assert isinstance(state, Mamba2State)
        config, dtype, ops = self.config, x.dtype, context.ops
        total = x.shape[0]
        z, xbc, dt = torch.split(
            linear(x, self.in_proj), [config.d_inner, config.conv_channels, config.num_heads], dim=-1
        )
        xbc = ops.causal_conv(xbc, state.conv, context.spans, self.conv_weight, self.conv_bias, dtype)
        heads, b, c = torch.split(xbc, [config.d_inner, config.d_state, config.d_state], dim=-1)
        y = ops.selective_scan(
            heads.reshape(total, config.num_heads, config.head_dim),
            softplus(dt.float() + self.dt_bias),
            self.a,
            b,
            c,
            self.d,
            state.ssm,
            context.spans,
            dtype,
        )
        y = y.view(total, config.d_inner).float()
        return linear(gated_rms_norm(y, z.float(), self.norm).to(dtype), self.out_proj)


class AttentionMixer:
    """Causal multi-head attention, rotary, in a window where the stage has one."""

    def __init__(self, config: AttentionConfig, take: TakeWeight) -> None:
        self.config = config
        self.qkv_proj = take("mixer.Wqkv.weight")
        self.out_proj = take("mixer.out_proj.weight")

    def __call__(self, x: Tensor, state: LayerState, context: StageContext) -> Tensor:
        """x: [T, D] → [T, D], both in the model's dtype."""
        assert isinstance(state, AttentionState)
        ops, total = context.ops, x.shape[0]
        qkv = linear(x, self.qkv_proj).view(total, 3, self.config.num_heads, self.config.head_dim)
        q, k, v = qkv.unbind(1)
        if context.rotary is not None:
            q, k = ops.rotate(q, context.rotary), ops.rotate(k, context.rotary)
        out = ops.attend(q, k, v, state.k, state.v, context.keys)
        return linear(out.view(total, -1), self.out_proj)


class Mlp:
    """SwiGLU: fc2(SiLU(gate) · value)."""

    def __init__(self, take: TakeWeight) -> None:
        self.fc1 = take("mlp.fc1.weight")
        self.fc2 = take("mlp.fc2.weight")

    def __call__(self, x: Tensor) -> Tensor:
        return linear(swiglu(linear(x, self.fc1)), self.fc2)


class Block:
    """One layer: residual += h; h = mixer(norm1(residual)); and the same with the MLP, if any."""

    def __init__(self, stage: StageConfig, layer: LayerConfig, take: TakeWeight) -> None:
        self.norm1 = take("norm1.weight").float()
        self.mixer: Mamba2Mixer | AttentionMixer
        if layer.mixer == "mamba2":
            assert stage.mamba2 is not None
            self.mixer = Mamba2Mixer(stage.mamba2, take)
        else:
            assert stage.attention is not None
            self.mixer = AttentionMixer(stage.attention, take)
        self.mlp = Mlp(take) if layer.has_mlp else None
        self.norm2 = take("norm2.weight").float() if layer.has_mlp else None

    def __call__(self, h: Tensor, residual: Tensor, state: LayerState, context: StageContext) -> tuple[Tensor, Tensor]:
        """h: [T, D] in the model's dtype, residual: [T, D] fp32, without h → the same two after the layer."""
        residual = residual + h.float()
        h = self.mixer(rms_norm(residual, self.norm1).to(h.dtype), state, context)
        if self.mlp is not None and self.norm2 is not None:
            residual = residual + h.float()
            h = self.mlp(rms_norm(residual, self.norm2).to(h.dtype))
        return h, residual


class IsotropicStack:
    """An encoder, decoder or main network: blocks in a row and an RMSNorm at the end."""

    def __init__(self, stage: StageConfig, name: str, take: TakeWeight) -> None:
        self.name = name
        layers = stage.stack(name).layers

        def below(index: int) -> TakeWeight:
            return lambda key: take(f"layers.{index}.{key}")

        self.blocks = [Block(stage, layer, below(index)) for index, layer in enumerate(layers)]
        self.norm = take("rmsnorm.weight").float()

    def __call__(
        self,
        h: Tensor,
        states: tuple[LayerState, ...],
        context: StageContext,
        note: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """h: [T, D] → [T, D], both in the model's dtype.

        The residual stream between is fp32; `note` is told what it is after each layer.
        """
        residual = torch.zeros_like(h, dtype=torch.float32)
        for index, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            h, residual = block(h, residual, state, context)
            if note is not None:
                note(index, residual + h.float())
        return rms_norm(residual + h.float(), self.norm).to(h.dtype)
