"""Random weights of a sensible scale, for benchmarks and tests of shapes nobody has trained.

Knows the official key names and their usual initial scales. A tensor depends on the seed,
its key and the configuration alone, so a model can be made one tensor at a time, and is the same
in every dtype and on every device up to rounding.
"""

from __future__ import annotations

import hashlib
import math

import torch

from hnet_runtime.config import ModelConfig, tensor_shapes

# A router compares W_q·h_prev with W_k·h_now. With unrelated W_q and W_k about every second position is a
# boundary. Every embedding shares a vector, and W_q a part of W_k, which together pull the cosine up: measured, 2 to 6
# positions a chunk at any width. The pull is in units of the cosine's own spread, which is 1/√D.
_SHARED = 0.5
_PULL = 3.0


def random_tensor(config: ModelConfig, key: str, seed: int = 0) -> torch.Tensor:
    """The tensor of `key` in float32 on the CPU. Raises KeyError for a key that `config` does not have."""
    shape = tensor_shapes(config)[key]
    random = _generator(seed, key)
    parent, _, name = key.rpartition(".")
    module = parent.rpartition(".")[2]

    def normal(scale: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, scale, generator=random)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(shape).uniform_(low, high, generator=random)

    fan_in = shape[-1]
    if key == "embeddings.weight":
        return normal(1.0) + _SHARED * torch.empty(fan_in).normal_(generator=random)
    if key == "lm_head.weight":
        return normal(2.0 / math.sqrt(fan_in))
    if module.startswith(("norm", "rmsnorm")):
        return normal(0.1).add_(1.0)
    if name == "A_log":
        return uniform(1.0, 16.0).log_()
    if name == "dt_bias":
        step = uniform(math.log(1e-3), math.log(1e-1)).exp_()
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    if name == "D":
        return normal(0.1).add_(1.0)
    if name == "pad_dimension":
        return normal(0.5)
    if module == "conv1d":
        return normal(0.1 if name == "bias" else 1.0 / math.sqrt(fan_in))
    if module == "q_proj_layer":
        twin = random_tensor(config, key.replace("q_proj_layer", "k_proj_layer"), seed)
        return normal(1.0 / math.sqrt(fan_in)).add_(twin, alpha=_PULL / math.sqrt(fan_in))
    if name == "bias":
        return normal(0.1)
    if module in ("out_proj", "fc2"):
        return normal(1.0 / math.sqrt(2 * fan_in * _stack_depth(config, key)))
    return normal(1.0 / math.sqrt(fan_in))


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _stack_depth(config: ModelConfig, key: str) -> int:
    """Layers of the stack that `key` belongs to: residual branches are scaled down by its root."""
    prefix = key.partition(".layers.")[0]
    return next(len(stack.layers) for stage in config.stages for stack in stage.stacks if stack.prefix == prefix)
