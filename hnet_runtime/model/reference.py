"""An H-Net written to be read beside the paper: the oracle of this repository.

Knows no cache, no batch, no requests and no speed: one sequence goes in whole, loops run
over time, and the recursion over stages is a recursion. Equation numbers are those of
*Dynamic Chunking for End-to-End Hierarchical Sequence Modeling* (arXiv 2507.07955); where
the released code differs from the paper, the weights follow the code, and so do we, saying so.

Tensors are a flat mapping under the official checkpoint's keys. Shapes use T for the
positions of the stage at hand, C for its chunks, D its width, H heads, P head dim, N states.

Precision: the residual stream, SSM state, router sums, EMA and `residual_proj` are kept
*wide* (float32, or float64 where the weights are float64); every other activation is
rounded to the weights' dtype where the released model holds a tensor of that dtype. Under
bfloat16 that includes 1 − cos of the router: cosines within rounding of zero are ties,
p = 0.5, and no boundary. The EMA, which the released code rounds as well, stays wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu, softplus

from hnet_runtime.config import (
    NORM_EPS,
    VOCAB_SIZE,
    AttentionConfig,
    Mamba2Config,
    ModelConfig,
    StackConfig,
    StageConfig,
    tensor_shapes,
)

ROTARY_BASE = 10000.0
EMA_CLAMP = 1e-4  # eq. (5) uses p clamped to [1e-4, 1 − 1e-4]

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class ReferenceOutput:
    """What one forward pass found, stage 0 first.

    `logits` [T, 256] in the weights' dtype. For every routed stage s with L_s positions,
    `probabilities[s]` [L_s] float and `boundaries[s]` [L_s] bool; L_0 = T, and L_{s+1} is the
    number of boundaries of stage s. `hidden` holds the output of every sub-network under its
    module path where recording was asked for, and is empty otherwise.
    """

    logits: Tensor
    probabilities: list[Tensor]
    boundaries: list[Tensor]
    hidden: dict[str, Tensor] = field(default_factory=dict)


class Reference:
    """A whole-sequence H-Net over official weights.

    `dtype` None keeps the dtype of `embeddings.weight`; float64 measures the rounding of
    float32. `D` and `residual_proj` stay wide in any dtype, as in the released model. Raises
    ValueError naming the key where a tensor is missing or of the wrong shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype | None = None) -> None:
        for key, shape in tensor_shapes(config).items():
            if key not in weights:
                raise ValueError(f"missing tensor {key}")
            if tuple(weights[key].shape) != shape:
                raise ValueError(f"{key} has shape {tuple(weights[key].shape)}, not {shape}")
        self.config = config
        self.dtype = dtype or weights["embeddings.weight"].dtype
        self.weights = {key: _cast(key, weights[key], self.dtype) for key in tensor_shapes(config)}

    @torch.no_grad()
    def forward(self, ids: Tensor, record_hidden: bool = False) -> ReferenceOutput:
        """ids: [T] int64, bytes 0–255 → logits [T, 256], the routers' verdicts, hidden outputs."""
        if ids.dim() != 1 or ids.numel() == 0:
            raise ValueError(f"ids must be a non-empty vector of bytes, not of shape {tuple(ids.shape)}")
        if int(ids.min()) < 0 or int(ids.max()) >= VOCAB_SIZE:
            raise ValueError(f"ids must lie in 0–{VOCAB_SIZE - 1}")
        trace = _Trace(record_hidden)
        x = trace.note("embeddings", embedding(ids, self.weights["embeddings.weight"]))
        z = hnet(self.weights, self.config.stages, x, trace)
        head = "embeddings.weight" if self.config.tie_embeddings else "lm_head.weight"
        return ReferenceOutput(linear(z, self.weights[head]), trace.probabilities, trace.boundaries, trace.hidden)

    def greedy(self, ids: Tensor | Sequence[int], count: int) -> list[int]:
        """The `count` most probable next bytes, one at a time, ties to the lowest byte.

        Recomputes everything for each byte; 255 (EOS) is a byte like any other.
        """
        sequence = [int(byte) for byte in ids]
        start = len(sequence)
        for _ in range(count):
            logits = self.forward(torch.tensor(sequence)).logits[-1]
            sequence.append(int((logits == logits.max()).nonzero()[0]))
        return sequence[start:]


class _Trace:
    """Collects what the recursion finds on its way, in the order of the stages."""

    def __init__(self, record_hidden: bool) -> None:
        self.record_hidden = record_hidden
        self.probabilities: list[Tensor] = []
        self.boundaries: list[Tensor] = []
        self.hidden: dict[str, Tensor] = {}

    def note(self, path: str, output: Tensor) -> Tensor:
        if self.record_hidden:
            self.hidden[path] = output
        return output


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept_wide = key.endswith(".mixer.D") or ".residual_proj." in key
    return tensor.to(_wide_dtype(dtype) if kept_wide else dtype)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the precision of everything that must not be rounded."""
    return x.to(_wide_dtype(x.dtype))


# ── the hierarchy: E⁰ E¹ … M … D¹ D⁰ ──────────────────────────────────────────────────────────


def hnet(weights: Weights, stages: Sequence[StageConfig], x: Tensor, trace: _Trace) -> Tensor:
    """Stage s and everything inside it, equations (1) to (3). x: [T, D_{s−1}] → [T, D_{s−1}].

    The innermost stage is the main network M alone; any other is D(Dechunk(hnet(Chunk(E(x))))
    + Linear(E(x))), where the network between Chunk and Dechunk is an H-Net again.
    """
    stage, *inner = stages
    x = widen(weights, stage, x)
    if not inner:
        z_hat = trace.note(stage.stack("main").prefix, isotropic(weights, stage, "main", x))
        return z_hat[:, : stage.d_outer]

    x_hat = trace.note(f"{stage.prefix}.encoder", isotropic(weights, stage, "encoder", x))
    p, b = route(weights, stage, x_hat)
    trace.probabilities.append(p)
    trace.boundaries.append(b)
    z_hat = trace.note(f"{inner[0].prefix}(out)", hnet(weights, inner, x_hat[b], trace))
    z_bar = trace.note(f"{stage.prefix}.dechunk_layer", dechunk(z_hat, p, b))
    z = z_bar + trace.note(f"{stage.prefix}.residual_proj", residual(weights, stage, x_hat))
    z_hat = trace.note(f"{stage.prefix}.decoder", isotropic(weights, stage, "decoder", z.to(x_hat.dtype)))
    return z_hat[:, : stage.d_outer]


def widen(weights: Weights, stage: StageConfig, x: Tensor) -> Tensor:
    """[T, D_{s−1}] → [T, D_s]: the learned `pad_dimension` is appended to every position (section 2.1)."""
    if not stage.pad_width:
        return x
    pad = weights[f"{stage.prefix}.pad_dimension"]
    return torch.cat([x, pad.expand(x.shape[0], -1)], dim=1)


def route(weights: Weights, stage: StageConfig, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """The routing module, equation (4): how unlike its predecessor is each position?

    x_hat: [T, D] → p: [T] in [0, 1], wide, b: [T] bool. The first position always opens a chunk.
    Two details follow the released code, not the paper: q is of the *previous* position and k
    of the current one, and a boundary needs p > 0.5, strictly.
    """
    q = linear(wide(x_hat[:-1]), wide(weights[f"{stage.prefix}.routing_module.q_proj_layer.weight"]))
    k = linear(wide(x_hat[1:]), wide(weights[f"{stage.prefix}.routing_module.k_proj_layer.weight"]))
    cosine = (unit(q) * unit(k)).sum(dim=1)
    unlikeness = wide((1 - cosine).to(x_hat.dtype))  # rounding here decides near-ties in bfloat16
    p = torch.cat([cosine.new_ones(1), (unlikeness / 2).clamp(0, 1)])
    return p, p > 0.5


def unit(x: Tensor) -> Tensor:
    """Each row of x divided by its length; a zero row stays zero."""
    return x / x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def dechunk(z_hat: Tensor, p: Tensor, b: Tensor) -> Tensor:
    """Smoothing, equation (5), and upsampling, equation (8): chunks back to positions.

    z_hat: [C, D], p: [T], b: [T] with C boundaries → [T, D], wide. The average starts from
    zero, so that the first chunk enters as (1 − 1e-4)·ẑ. The confidence factor of equations
    (6), (7) and (9) is exactly 1 in a forward pass and is left out.
    """
    z_bar = torch.zeros_like(wide(z_hat[0]))
    chunks = iter(wide(z_hat))
    positions = []
    for probability, opens in zip(p.clamp(EMA_CLAMP, 1 - EMA_CLAMP), b, strict=True):
        if opens:
            z_bar = probability * next(chunks) + (1 - probability) * z_bar
        positions.append(z_bar)
    return torch.stack(positions)


def residual(weights: Weights, stage: StageConfig, x_hat: Tensor) -> Tensor:
    """The linear residual of equation (3), with a bias, wide. x_hat: [T, D] → [T, D]."""
    prefix = f"{stage.prefix}.residual_proj"
    return linear(wide(x_hat), weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])


# ── one network of a stage ────────────────────────────────────────────────────────────────────


def isotropic(weights: Weights, stage: StageConfig, name: str, x: Tensor) -> Tensor:
    """A stack of pre-norm blocks with an RMSNorm at its end. x: [T, D] → [T, D].

    The residual stream is wide; every norm reads it and rounds its own output.
    """
    stack: StackConfig = stage.stack(name)
    stream = wide(x)
    for index, layer in enumerate(stack.layers):
        prefix = f"{stack.prefix}.layers.{index}"
        h = rms_norm(stream, weights[f"{prefix}.norm1.weight"])
        if layer.mixer == "mamba2":
            assert stage.mamba2 is not None
            stream = stream + mamba2(weights, f"{prefix}.mixer", stage.mamba2, h)
        else:
            assert stage.attention is not None
            stream = stream + attention(weights, f"{prefix}.mixer", stage.attention, h)
        if layer.has_mlp:
            stream = stream + swiglu(weights, f"{prefix}.mlp", rms_norm(stream, weights[f"{prefix}.norm2.weight"]))
    return rms_norm(stream, weights[f"{stack.prefix}.rmsnorm.weight"])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / √(mean x² + eps) · weight, over the last axis; rounded to the weight's dtype."""
    x = wide(x)
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS) * wide(weight)).to(weight.dtype)


def swiglu(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """fc2(SiLU(gate) · value). x: [T, D] → [T, D]. `fc1` gives the value first, then the gate."""
    value, gate = linear(x, weights[f"{prefix}.fc1.weight"]).chunk(2, dim=1)
    return linear((silu(wide(gate)) * wide(value)).to(x.dtype), weights[f"{prefix}.fc2.weight"])


def attention(weights: Weights, prefix: str, config: AttentionConfig, x: Tensor) -> Tensor:
    """Causal attention with rotary positions of this stage. x: [T, D] → [T, D].

    With a window w ≥ 0 a query sees itself and the w positions before it, w + 1 keys.
    """
    length, width = x.shape
    qkv = linear(x, weights[f"{prefix}.Wqkv.weight"])
    q, k, v = qkv.view(length, 3, config.num_heads, config.head_dim).permute(1, 2, 0, 3)  # [H, T, P] each
    q, k = rotary(q, config.rotary_dim), rotary(k, config.rotary_dim)

    distance = torch.arange(length)[:, None] - torch.arange(length)  # query minus key
    seen = distance >= 0
    if config.window >= 0:
        seen &= distance <= config.window
    scores = wide(q) @ wide(k).transpose(1, 2) / sqrt(config.head_dim)  # [H, T, T]
    out = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ wide(v)
    return linear(out.to(x.dtype).transpose(0, 1).reshape(length, width), weights[f"{prefix}.out_proj.weight"])


def rotary(x: Tensor, dim: int) -> Tensor:
    """Turns channel i against channel i + dim/2, for the first `dim` channels of a head. x: [H, T, P].

    Angles are wide; their sines and cosines are rounded to the dtype of x, as in the released code.
    """
    if not dim:
        return x
    frequency = ROTARY_BASE ** -(torch.arange(0, dim, 2, dtype=_wide_dtype(x.dtype)) / dim)
    angle = torch.arange(x.shape[1], dtype=frequency.dtype)[:, None] * frequency  # [T, dim/2]
    cos, sin = wide(angle.cos().to(x.dtype)), wide(angle.sin().to(x.dtype))
    first, second, rest = wide(x).split_with_sizes([dim // 2, dim // 2, x.shape[2] - dim], dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=2).to(x.dtype)


def mamba2(weights: Weights, prefix: str, config: Mamba2Config, x: Tensor) -> Tensor:
    """Mamba-2 (arXiv 2405.21060) with one group, its recurrence written as a loop. x: [T, D] → [T, D].

    For every head: S_t = exp(Δ_t·A)·S_{t−1} + Δ_t·x_t ⊗ B_t and y_t = S_t·C_t + D·x_t, then
    out_proj(RMSNorm(y · SiLU(z))).
    """
    heads, channels = config.num_heads, config.head_dim
    projected = linear(x, weights[f"{prefix}.in_proj.weight"])
    z, xbc, dt = projected.split_with_sizes([config.d_inner, config.conv_channels, heads], dim=1)
    xbc = causal_conv(xbc, weights[f"{prefix}.conv1d.weight"], weights[f"{prefix}.conv1d.bias"])
    u, b, c = wide(xbc).split_with_sizes([config.d_inner, config.d_state, config.d_state], dim=1)
    u = u.view(-1, heads, channels)
    delta = softplus(wide(dt) + wide(weights[f"{prefix}.dt_bias"]))  # [T, H]
    decay = torch.exp(-delta * wide(weights[f"{prefix}.A_log"]).exp())  # A = −exp(A_log)
    skip = weights[f"{prefix}.D"][:, None] * u  # [T, H, P]

    state = u.new_zeros(heads, channels, config.d_state)
    y = torch.empty_like(u)
    for t in range(x.shape[0]):
        state = decay[t, :, None, None] * state + (delta[t, :, None] * u[t])[:, :, None] * b[t]
        y[t] = state @ c[t] + skip[t]
    gated = wide(y.flatten(1).to(x.dtype)) * silu(wide(z))
    return linear(rms_norm(gated, weights[f"{prefix}.norm.weight"]), weights[f"{prefix}.out_proj.weight"])


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a depthwise convolution over the last K positions, zeros before the first.

    x: [T, channels], weight: [channels, 1, K] (its last tap meets the current position) → [T, channels].
    """
    taps = weight.shape[2]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    total = wide(bias).expand(x.shape)
    for tap in range(taps):
        total = total + wide(padded[tap : tap + x.shape[0]]) * wide(weight[:, 0, tap])
    return silu(total).to(x.dtype)
