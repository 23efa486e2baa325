"""Random H-Nets for tests, drawn like the golden ones but in any layout.

Weights have the scale of `tests/golden`: `D`, `dt_bias`, `pad_dimension`, `residual_proj`
and every norm matter. Routers are then calibrated on a sample text so that boundaries are
neither rare nor everywhere and no verdict on that text lies near a tie.

Other folders' tests reach this through the fixtures `make_case` and `generated` of
`tests/conftest.py`; nothing here is imported by the packages under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hnet_runtime.config import BOS, ModelConfig, StageConfig, tensor_shapes
from hnet_runtime.model.reference import Reference, route

SAMPLE_TEXT = (
    "The lighthouse keeper counted 27 ships before noon; by dusk (he swore) there were none.\n"
    "\tnaïve façade, 東京の夜, Ωmega & 🐙 — x = f(y[0]) * 3.5e-4;\n\n"
    "aaaaaaaaaaaaaaaa tttt and then: nothing at all, again and again, until the tide turned its back."
)
TARGET_RATE, RATE_SLACK = 0.38, 0.08


@dataclass(frozen=True)
class GeneratedCase:
    """A model without a recorded truth: compare with `Reference(case.config, case.weights)`."""

    name: str
    config: ModelConfig
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class CaseShape:
    """The arguments of `make_case` beside its seed."""

    layout: list[Any]
    widths: list[int]
    options: dict[str, Any] = field(default_factory=dict)


CASE_SHAPES: dict[str, CaseShape] = {
    "three_routed_stages": CaseShape(["m2", ["T1m1", ["m1t1", ["T2"], "M1"], "m1T1"], "m2"], [64, 96, 96, 128]),
    "four_routed_stages": CaseShape(
        ["m1", ["m1", ["t1", ["m1", ["T1"], "m1"], "t1"], "m1T1"], "m1"], [64, 64, 96, 96, 160]
    ),
    "equal_widths": CaseShape(["m1", ["T1m1", ["T1"], "m1T1"], "m1"], [64, 64, 64], {"window_size": [-1, 5, -1]}),
    "mixed_letters": CaseShape(["M1t1", ["t1M1", ["M1t1"], "m1"], "t2"], [64, 96, 128], {"window_size": [9, 3, 2]}),
    "mamba_main": CaseShape(["m1", ["m2"], "m1"], [64, 96]),
    "window_smaller_than_prompt": CaseShape(["T1m1", ["T1"], "m1t1"], [64, 96], {"window_size": [6, 4]}),
    "window_larger_than_prompt": CaseShape(["T1m1", ["T1"], "m1T1"], [64, 96], {"window_size": [1023, 511]}),
    "window_zero": CaseShape(["m1t1", ["T1"], "T1"], [64, 64], {"window_size": [0, -1]}),
    "tied_embeddings": CaseShape(["m2", ["T2"], "m2"], [64, 96], {"tie_embeddings": True}),
    "odd_head_dims": CaseShape(
        ["t2", ["T1", ["T1"], "t1"], "T1"],
        [60, 63, 91],
        {"num_heads": [4, 3, 7], "rotary_emb_dim": [6, 20, 12], "window_size": [11, -1, -1]},
    ),
    "without_rotary": CaseShape(["m1", ["T2"], "m1t1"], [64, 64], {"rotary_emb_dim": 0, "window_size": [17, -1]}),
    "state_16_and_48_conv_3": CaseShape(
        ["m2", ["m1T1", ["T1m1"], "M1"], "m2"], [64, 64, 96], {"d_state": [16, 48, 16], "d_conv": 3}
    ),
    "conv_2_expand_3": CaseShape(["m2", ["m1T1"], "m1"], [64, 128], {"d_conv": 2, "expand": 3, "d_state": 24}),
    "bytes_through_mamba_alone": CaseShape(["m2"], [64]),
    "bytes_through_mixed_main": CaseShape(["T1m1M1t1"], [64], {"window_size": 12}),
}


def make_case(
    seed: int,
    layout: Sequence[Any],
    widths: Sequence[int],
    *,
    d_intermediate: Sequence[int] | None = None,
    num_heads: int | Sequence[int] = 4,
    rotary_emb_dim: int | Sequence[int] = 16,
    window_size: int | Sequence[int] = -1,
    d_state: int | Sequence[int] = 32,
    d_conv: int | Sequence[int] = 4,
    expand: int | Sequence[int] = 2,
    tie_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A random model under the official keys; the same arguments give the same weights.

    Single values hold for every stage. With bfloat16, `D` and `residual_proj` stay float32,
    as in official checkpoints.
    """
    document = {
        "arch_layout": layout,
        "d_model": list(widths),
        "d_intermediate": list(d_intermediate or [2 * width for width in widths]),
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": d_conv, "d_state": d_state, "expand": expand},
        "attn_cfg": {
            "num_heads": _spread(num_heads, widths),
            "rotary_emb_dim": _spread(rotary_emb_dim, widths),
            "window_size": _spread(window_size, widths),
        },
        "tie_embeddings": tie_embeddings,
    }
    config = ModelConfig.from_dict(document, f"case {seed}")
    generator = torch.Generator().manual_seed(seed)
    weights = {key: _draw(key, shape, tie_embeddings, generator) for key, shape in tensor_shapes(config).items()}
    for stage in config.stages[:-1]:
        _calibrate_router(config, weights, stage)
    kept = (".mixer.D", ".residual_proj.weight", ".residual_proj.bias")
    return config, {key: tensor if key.endswith(kept) else tensor.to(dtype) for key, tensor in weights.items()}


def make_named_case(name: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> GeneratedCase:
    """One of `CASE_SHAPES` with weights drawn from `seed`."""
    shape = CASE_SHAPES[name]
    config, weights = make_case(seed, shape.layout, shape.widths, dtype=dtype, **shape.options)
    return GeneratedCase(name, config, weights)


def sample_ids(text: str = SAMPLE_TEXT) -> Tensor:
    """BOS and the text's bytes, [T] int64."""
    return torch.tensor([BOS, *text.encode()])


def _spread(value: int | Sequence[int], widths: Sequence[int]) -> list[int]:
    return [value] * len(widths) if isinstance(value, int) else list(value)


def _draw(key: str, shape: tuple[int, ...], tied: bool, generator: torch.Generator) -> Tensor:
    """One tensor at the scale that its kind has in the golden checkpoints."""
    noise = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    width = shape[-1]
    if key == "embeddings.weight":
        return noise * (2.8 / math.sqrt(width)) if tied else noise
    if key == "lm_head.weight":
        return noise * 2.8 / math.sqrt(width)
    if key.endswith("dt_bias"):  # softplus(dt_bias) spreads over 0.003–0.2
        step = torch.exp(math.log(0.003) + uniform * math.log(0.2 / 0.003))
        return step + torch.log(-torch.expm1(-step))
    if key.endswith("A_log"):
        return torch.log(1 + 15 * uniform)
    if key.endswith("mixer.D"):
        return 1 + 0.3 * noise
    if key.endswith("conv1d.weight"):
        return 0.9 * noise / math.sqrt(width)
    if key.endswith("conv1d.bias"):
        return 0.2 * noise
    if key.endswith("pad_dimension"):
        return 0.8 * noise
    if key.endswith("residual_proj.bias"):
        return 0.25 * noise
    if key.endswith("residual_proj.weight"):
        return 0.8 * noise / math.sqrt(width)
    if ".routing_module." in key:
        return torch.eye(width) + 0.5 * noise / math.sqrt(width)
    if key.endswith("Wqkv.weight"):
        return 1.44 * noise / math.sqrt(width)
    if len(shape) == 1:  # norms
        return 1 + 0.15 * noise
    return 0.9 * noise / math.sqrt(width)  # in_proj, out_proj, fc1, fc2


def _calibrate_router(config: ModelConfig, weights: dict[str, Tensor], stage: StageConfig) -> None:
    """Makes the stage's boundary rate on the sample text about TARGET_RATE, clear of ties.

    All vectors of a stage lean towards their mean; taking γ times that direction out of
    `k_proj` lowers every cosine and so raises the rate with γ.
    """
    x_hat = Reference(config, weights).forward(sample_ids(), record_hidden=True).hidden[f"{stage.prefix}.encoder"]
    key = f"{stage.prefix}.routing_module.k_proj_layer.weight"
    drawn = weights[key]
    mean = x_hat.mean(dim=0)
    lean = torch.outer(mean, mean) / mean.square().sum()
    found: list[tuple[float, float]] = []  # (distance of the nearest verdict from a tie, γ)
    for gamma in torch.linspace(-3, 3, 241).tolist():
        p, b = route({**weights, key: drawn - gamma * lean}, stage, x_hat)
        if abs(float(b[1:].float().mean()) - TARGET_RATE) <= RATE_SLACK:
            found.append((float((p - 0.5).abs().min()), gamma))
    if not found:
        raise ValueError(f"no router of {stage.prefix} has a boundary rate near {TARGET_RATE}; take another seed")
    weights[key] = drawn - max(found)[1] * lean
