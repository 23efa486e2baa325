"""A decoding step as plain torch code has it: one row, state updated in place, `F.linear` and nothing special.

What the native step is compared with, eager and under torch.compile. It obeys the model's own router, keeps all state
and recomputes nothing; but it is one row only and gives no promise of equal bits. Keys are in a buffer of fixed size
that is attended whole under a mask, which is what a graph of fixed shapes needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.chunked_scan import rms_norm, swiglu
from hnet_runtime.config import AttentionConfig, Mamba2Config, ModelConfig, StackConfig, StageConfig
from hnet_runtime.ops.ema import P_MAX, P_MIN
from hnet_runtime.ops.rotary import rotary_table, rotate

Weights = Mapping[str, Tensor]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class _StageMemory:
    """What a stage carries: two tensors a layer, and the position; for a routed one, router and EMA vectors."""

    layers: dict[str, tuple[Tensor, Tensor]]
    position: Tensor  # [] int64
    previous: Tensor  # [D]
    ema: Tensor  # [D]


class PlainStep:
    """One row of a model. wrap: what is put around each of the step's parts, such as torch.compile."""

    def __init__(self, config: ModelConfig, weights: Weights, max_positions: int, wrap: Wrap | None = None) -> None:
        self.config, self._weights = config, weights
        dtype = weights["embeddings.weight"].dtype
        self._memories = [_memory(stage, max_positions, dtype) for stage in config.stages]
        self._rotary = [
            rotary_table(torch.arange(max_positions), stage.attention.rotary_dim)
            if stage.attention is not None and stage.attention.rotary_dim
            else None
            for stage in config.stages
        ]
        wrap = wrap or (lambda part: part)
        self._enter = [wrap(self._entering(stage)) for stage in config.stages]
        self._leave = [wrap(self._leaving(stage)) for stage in config.stages[:-1]]
        self._head = weights["embeddings.weight" if config.tie_embeddings else "lm_head.weight"]

    @torch.inference_mode()
    def step(self, byte: int) -> Tensor:
        """[V] logits after one byte more."""
        h = self._weights["embeddings.weight"][byte : byte + 1]
        way: list[tuple[Tensor, Tensor]] = []
        z: Tensor | None = None
        for stage, enter in zip(self.config.stages, self._enter, strict=True):
            h, p = enter(h)
            if stage.is_main:
                z = h
                break
            way.append((h, p))
            if not p.item() > 0.5:
                break
        for index in reversed(range(len(way))):
            h, p = way[index]
            ema = self._memories[index].ema
            if z is not None:
                p = p.clamp(P_MIN, P_MAX)
                ema.mul_(1 - p).add_(p * z[0, : ema.shape[0]])
            z = self._leave[index](h, ema)
        assert z is not None
        return F.linear(z[0], self._head).float()

    def _entering(self, stage: StageConfig) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """[1, d_outer] → the encoder's output (the main network's, cut) and p."""
        memory = self._memories[stage.index]

        def enter(x: Tensor) -> tuple[Tensor, Tensor]:
            if stage.pad_width:
                x = torch.cat([x, self._weights[f"{stage.prefix}.pad_dimension"].unsqueeze(0)], 1)
            h = self._stack(stage, stage.stacks[0], x)
            if stage.is_main:
                memory.position += 1
                return h[:, : stage.d_outer], h
            router = f"{stage.prefix}.routing_module"
            q = F.linear(memory.previous, self._weights[f"{router}.q_proj_layer.weight"])
            k = F.linear(h[0], self._weights[f"{router}.k_proj_layer.weight"])
            p = (1 - F.cosine_similarity(q.float(), k.float(), 0)).clamp(0, 2) / 2
            p = torch.where(memory.position == 0, torch.ones_like(p), p)
            memory.previous.copy_(h[0])
            return h, p

        return enter

    def _leaving(self, stage: StageConfig) -> Callable[[Tensor, Tensor], Tensor]:
        memory, prefix = self._memories[stage.index], f"{stage.prefix}.residual_proj"

        def leave(h: Tensor, ema: Tensor) -> Tensor:
            weight, bias = self._weights[f"{prefix}.weight"], self._weights[f"{prefix}.bias"]
            z = (F.linear(h.float(), weight.float(), bias.float()) + ema).to(h.dtype)
            z = self._stack(stage, stage.stacks[1], z)
            memory.position += 1
            return z[:, : stage.d_outer]

        return leave

    def _stack(self, stage: StageConfig, stack: StackConfig, x: Tensor) -> Tensor:
        stream, memory = x.float(), self._memories[stage.index]
        for index, layer in enumerate(stack.layers):
            prefix = f"{stack.prefix}.layers.{index}"
            h = rms_norm(stream, self._weights[f"{prefix}.norm1.weight"])
            first, second = memory.layers[prefix]
            if layer.mixer == "mamba2":
                assert stage.mamba2 is not None
                stream = stream + self._mamba2(f"{prefix}.mixer", stage.mamba2, h, first, second)
            else:
                assert stage.attention is not None
                stream = stream + self._attention(f"{prefix}.mixer", stage, stage.attention, h, first, second)
            if layer.has_mlp:
                h = rms_norm(stream, self._weights[f"{prefix}.norm2.weight"])
                stream = stream + swiglu(self._weights, f"{prefix}.mlp", h)
        return rms_norm(stream, self._weights[f"{stack.prefix}.rmsnorm.weight"])

    def _mamba2(self, prefix: str, config: Mamba2Config, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        """conv: [E, K] the last inputs, ssm: [H, P, N]; both in place."""
        weights = self._weights
        z, xbc, dt = F.linear(x, weights[f"{prefix}.in_proj.weight"])[0].split(
            [config.d_inner, config.conv_channels, config.num_heads]
        )
        conv.copy_(torch.cat([conv[:, 1:], xbc.unsqueeze(1)], 1))
        taps, bias = weights[f"{prefix}.conv1d.weight"].squeeze(1), weights[f"{prefix}.conv1d.bias"]
        xbc = F.silu((conv * taps).sum(1) + bias).float()
        u, b, c = xbc.split([config.d_inner, config.d_state, config.d_state])
        u = u.view(config.num_heads, config.head_dim)
        delta = F.softplus(dt.float() + weights[f"{prefix}.dt_bias"].float())
        decay = torch.exp(-delta * torch.exp(weights[f"{prefix}.A_log"].float()))
        ssm.mul_(decay[:, None, None]).add_((delta[:, None] * u)[:, :, None] * b)
        y = (ssm @ c + weights[f"{prefix}.D"].float()[:, None] * u).view(1, -1)
        y = rms_norm(y * F.silu(z.float()), weights[f"{prefix}.norm.weight"])
        return F.linear(y, weights[f"{prefix}.out_proj.weight"])

    def _attention(
        self, prefix: str, stage: StageConfig, config: AttentionConfig, x: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """keys, values: [H, L, P], in place."""
        position = self._memories[stage.index].position
        qkv = F.linear(x, self._weights[f"{prefix}.Wqkv.weight"]).view(1, 3, config.num_heads, config.head_dim)
        q, k, v = qkv.unbind(1)
        table = self._rotary[stage.index]
        if table is not None:
            here = tuple(part.index_select(0, position.unsqueeze(0)) for part in table)
            q, k = rotate(q, (here[0], here[1])), rotate(k, (here[0], here[1]))
        keys.index_copy_(1, position.unsqueeze(0), k.transpose(0, 1))
        values.index_copy_(1, position.unsqueeze(0), v.transpose(0, 1))
        distance = position - torch.arange(keys.shape[1])
        seen = distance >= 0
        if config.window >= 0:
            seen = seen & (distance <= config.window)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=seen.unsqueeze(0)
        )
        return F.linear(out.reshape(1, -1), self._weights[f"{prefix}.out_proj.weight"])


def _memory(stage: StageConfig, max_positions: int, dtype: torch.dtype) -> _StageMemory:
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for stack in stage.stacks:
        for index, layer in enumerate(stack.layers):
            key = f"{stack.prefix}.layers.{index}"
            if layer.mixer == "mamba2":
                assert stage.mamba2 is not None
                ssm = stage.mamba2
                conv = torch.zeros(ssm.conv_channels, ssm.d_conv, dtype=dtype)
                layers[key] = conv, torch.zeros(ssm.num_heads, ssm.head_dim, ssm.d_state)
            else:
                assert stage.attention is not None
                shape = stage.attention.num_heads, max_positions, stage.attention.head_dim
                layers[key] = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    vector = torch.zeros(stage.d_model, dtype=dtype)
    return _StageMemory(layers, torch.zeros((), dtype=torch.int64), vector, torch.zeros(stage.d_model))
