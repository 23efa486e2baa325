"""AdamW over a model's parameters by their names: who learns how fast, who decays, how the rate goes with bytes seen.

Knows key names and gradients; nothing of models' forwards or data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig, stage_tensor_shapes
from training.settings import Optimizer, Schedule

_NO_DECAY = ("A_log", "D", "dt_bias", "bias", "pad_dimension")


def network_of(config: ModelConfig) -> dict[str, str]:
    """Key → the network it belongs to: `embeddings`, `head`, or of a stage `encoder`, `decoder`, `main`, `router`,
    `residual`, with the stage's number behind."""
    names = {"embeddings.weight": "embeddings"}
    for stage, key, _ in stage_tensor_shapes(config):
        names[key] = f"{_part(key[len(stage.prefix) + 1 :], stage.is_main)}{stage.index}"
    if not config.tie_embeddings:
        names["lm_head.weight"] = "head"
    return names


def _part(below: str, is_main: bool) -> str:
    if is_main:
        return "main"
    first = below.partition(".")[0]
    return {"routing_module": "router", "residual_proj": "residual", "pad_dimension": "encoder"}.get(first, first)


def parameter_groups(
    config: ModelConfig, parameters: Mapping[str, Tensor], settings: Optimizer
) -> list[dict[str, object]]:
    """torch's parameter groups: `names` their keys, `multiplier` what their rate is of stage 0's."""
    stage_of = {key: stage.index for stage, key, _ in stage_tensor_shapes(config)}
    multipliers = settings.multipliers or [1.0] * len(config.stages)
    groups: dict[tuple[float, float], list[str]] = {}
    for key in parameters:
        multiplier = multipliers[stage_of.get(key, 0)]
        if ".routing_module." in key:
            multiplier *= settings.router_multiplier
        groups.setdefault((multiplier, settings.weight_decay if decays(key) else 0.0), []).append(key)
    return [
        {
            "params": [parameters[key] for key in keys],
            "names": keys,
            "multiplier": multiplier,
            "lr": settings.learning_rate * multiplier,
            "weight_decay": decay,
        }
        for (multiplier, decay), keys in groups.items()
    ]


def decays(key: str) -> bool:
    """Weights of projections decay; norms, biases, embeddings and what sets a recurrence's times do not."""
    parent, _, name = key.rpartition(".")
    module = parent.rpartition(".")[2]
    return name not in _NO_DECAY and not module.startswith(("norm", "rmsnorm", "embeddings", "conv1d"))


def rate_at(schedule: Schedule, seen: int) -> float:
    """What the learning rate is of its height when `seen` bytes have been seen."""
    rise = min(1.0, (seen + 1) / schedule.warmup) if schedule.warmup else 1.0
    left = max(0, schedule.total - seen)
    fall = 1.0 if left >= schedule.decay else schedule.floor + (1 - schedule.floor) * left / schedule.decay
    return rise * fall


def clip(gradients: Mapping[str, Tensor], networks: Mapping[str, str], settings: Optimizer) -> dict[str, float]:
    """Holds gradients to their limit in place; returns each network's norm before."""
    members: dict[str, list[Tensor]] = {}
    for key, gradient in gradients.items():
        members.setdefault(networks[key], []).append(gradient)
    norms = {
        network: float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(each))))
        for network, each in members.items()
    }
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    for network, each in members.items():
        norm = norms[network] if settings.clip_each_network else whole
        if norm > settings.clip:
            torch._foreach_mul_(each, settings.clip / norm)
    return norms
