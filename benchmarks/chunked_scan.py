"""Prefill as a good plain-torch implementation does it: the opponent of the native prefill.

One row, the whole prompt at once: library matrix products over all positions, Mamba-2 as a scan over chunks of
matrix products (arXiv 2405.21060, section 6), `scaled_dot_product_attention`, the EMA as the same scan. Knows no state
and no rows: it gives the last position's logits and keeps nothing, which is less than a server needs. No two of its
sums need have the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.config import NORM_EPS, AttentionConfig, Mamba2Config, ModelConfig, StageConfig
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.ops.ema import P_MAX, P_MIN
from hnet_runtime.ops.rotary import rotary_table, rotate

Weights = Mapping[str, Tensor]


class ChunkedScan:
    """The model over whole prompts. scan_chunk: positions of one chunk of the scan."""

    def __init__(
        self, config: ModelConfig, weights: Weights, override: RouterOverride | None = None, scan_chunk: int = 64
    ) -> None:
        self.config, self.scan_chunk = config, scan_chunk
        self._weights, self._override = weights, override

    @torch.inference_mode()
    def prefill(self, prompt: bytes) -> Tensor:
        """[V] logits of the byte after the prompt."""
        x = self._weights["embeddings.weight"][torch.tensor(list(prompt))]
        head = "embeddings.weight" if self.config.tie_embeddings else "lm_head.weight"
        return F.linear(self._stage(0, x)[-1], self._weights[head]).float()

    def _stage(self, index: int, x: Tensor) -> Tensor:
        """[T, d_outer] → [T, d_outer]."""
        stage = self.config.stages[index]
        if stage.pad_width:
            x = torch.cat([x, self._weights[f"{stage.prefix}.pad_dimension"].expand(x.shape[0], -1)], 1)
        if stage.is_main:
            return self._stack(stage, "main", x)[:, : stage.d_outer]
        h = self._stack(stage, "encoder", x)
        p = self._boundary_probability(stage, h)
        opens = p > 0.5
        z = self._stage(index + 1, h[opens])
        smooth = self._ema(z.float(), p[opens].clamp(P_MIN, P_MAX))
        residual = f"{stage.prefix}.residual_proj"
        kept = F.linear(
            h.float(), self._weights[f"{residual}.weight"].float(), self._weights[f"{residual}.bias"].float()
        )
        z = (smooth[opens.cumsum(0) - 1] + kept).to(h.dtype)
        return self._stack(stage, "decoder", z)[:, : stage.d_outer]

    def _boundary_probability(self, stage: StageConfig, h: Tensor) -> Tensor:
        """[T, D] → p [T]; the first position always opens a chunk."""
        router = f"{stage.prefix}.routing_module"
        q = F.linear(h[:-1], self._weights[f"{router}.q_proj_layer.weight"])
        k = F.linear(h[1:], self._weights[f"{router}.k_proj_layer.weight"])
        p = F.pad((1 - F.cosine_similarity(q.float(), k.float())).clamp(0, 2) / 2, (1, 0), value=1.0)
        if self._override is None:
            return p
        positions = torch.arange(h.shape[0]).numpy()
        return torch.from_numpy(self._override.p(stage.index, 0 * positions + 1, positions))

    def _ema(self, x: Tensor, p: Tensor) -> Tensor:
        """z̄_t = p_t x_t + (1 − p_t) z̄_{t−1} as a scan with one head and one state. x: [C, D], p: [C] → [C, D]."""
        ones = x.new_ones(x.shape[0], 1)
        return scan((p[:, None] * x).unsqueeze(1), torch.log1p(-p)[:, None], ones, ones, self.scan_chunk).squeeze(1)

    def _stack(self, stage: StageConfig, name: str, x: Tensor) -> Tensor:
        config, stream = stage.stack(name), x.float()
        for index, layer in enumerate(config.layers):
            prefix = f"{config.prefix}.layers.{index}"
            h = rms_norm(stream, self._weights[f"{prefix}.norm1.weight"])
            if layer.mixer == "mamba2":
                assert stage.mamba2 is not None
                stream = stream + self._mamba2(f"{prefix}.mixer", stage.mamba2, h)
            else:
                assert stage.attention is not None
                stream = stream + self._attention(f"{prefix}.mixer", stage.attention, h)
            if layer.has_mlp:
                h = rms_norm(stream, self._weights[f"{prefix}.norm2.weight"])
                stream = stream + swiglu(self._weights, f"{prefix}.mlp", h)
        return rms_norm(stream, self._weights[f"{config.prefix}.rmsnorm.weight"])

    def _mamba2(self, prefix: str, config: Mamba2Config, x: Tensor) -> Tensor:
        weights, length = self._weights, x.shape[0]
        z, xbc, dt = F.linear(x, weights[f"{prefix}.in_proj.weight"]).split(
            [config.d_inner, config.conv_channels, config.num_heads], 1
        )
        kernel, bias = weights[f"{prefix}.conv1d.weight"], weights[f"{prefix}.conv1d.bias"]
        padded = F.pad(xbc.t().unsqueeze(0), (config.d_conv - 1, 0))
        xbc = F.silu(F.conv1d(padded, kernel, bias, groups=config.conv_channels)).squeeze(0).t().float()
        u, b, c = xbc.split([config.d_inner, config.d_state, config.d_state], 1)
        u = u.reshape(length, config.num_heads, config.head_dim)
        delta = F.softplus(dt.float() + weights[f"{prefix}.dt_bias"].float())
        a = -torch.exp(weights[f"{prefix}.A_log"].float())
        y = scan(u * delta.unsqueeze(2), delta * a, b, c, self.scan_chunk)
        y = (y + weights[f"{prefix}.D"].float()[:, None] * u).reshape(length, config.d_inner)
        return F.linear(
            rms_norm(y * F.silu(z.float()), weights[f"{prefix}.norm.weight"]), weights[f"{prefix}.out_proj.weight"]
        )

    def _attention(self, prefix: str, config: AttentionConfig, x: Tensor) -> Tensor:
        length = x.shape[0]
        qkv = F.linear(x, self._weights[f"{prefix}.Wqkv.weight"]).view(length, 3, config.num_heads, config.head_dim)
        q, k, v = qkv.unbind(1)
        if config.rotary_dim:
            table = rotary_table(torch.arange(length), config.rotary_dim)
            q, k = rotate(q, table), rotate(k, table)
        heads = [each.transpose(0, 1).unsqueeze(0) for each in (q, k, v)]
        if 0 <= config.window < length - 1:
            distance = torch.arange(length)[:, None] - torch.arange(length)
            seen = (distance >= 0) & (distance <= config.window)
            out = F.scaled_dot_product_attention(*heads, attn_mask=seen)
        else:
            out = F.scaled_dot_product_attention(*heads, is_causal=True)
        out = out.squeeze(0).transpose(0, 1).reshape(length, -1)
        return F.linear(out, self._weights[f"{prefix}.out_proj.weight"])


def scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """S_t = exp(log_decay_t) S_{t−1} + x_t ⊗ b_t;  y_t = S_t c_t, a chunk of positions at a time.

    x: [T, H, P], log_decay: [T, H], b, c: [T, N], fp32 → y: [T, H, P]. Within a chunk attention-like products, between
    chunks the states alone.
    """
    length, heads, width = x.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    if padding:
        x, log_decay = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(log_decay, (0, 0, 0, padding))
        b, c = F.pad(b, (0, 0, 0, padding)), F.pad(c, (0, 0, 0, padding))
    x = x.view(-1, chunk, heads, width).transpose(1, 2)  # [G, H, Q, P]
    b, c = b.view(-1, 1, chunk, b.shape[1]), c.view(-1, 1, chunk, c.shape[1])  # [G, 1, Q, N]
    decay = log_decay.view(-1, chunk, heads).transpose(1, 2).cumsum(2)  # [G, H, Q]
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    within = torch.exp((decay.unsqueeze(3) - decay.unsqueeze(2)).masked_fill(later, float("-inf")))  # [G, H, Q, Q]
    y = (within * (c @ b.transpose(2, 3))) @ x
    states = (x * torch.exp(decay[:, :, -1:] - decay).unsqueeze(3)).transpose(2, 3) @ b  # [G, H, P, N]
    through = torch.exp(decay[:, :, -1])[:, :, None, None]
    carried = torch.zeros_like(states)  # the state before each chunk
    for index in range(1, len(states)):
        carried[index] = through[index - 1] * carried[index - 1] + states[index - 1]
    y = y + (c @ carried.transpose(2, 3)) * torch.exp(decay).unsqueeze(3)
    return y.transpose(1, 2).reshape(-1, heads, width)[:length]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """In fp32, rounded to the weight's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), NORM_EPS).to(weight.dtype)


def swiglu(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    value, gate = F.linear(x, weights[f"{prefix}.fc1.weight"]).chunk(2, -1)
    return F.linear(F.silu(gate) * value, weights[f"{prefix}.fc2.weight"])
