"""What an H-Net's parameters are before they have learned anything.

Knows the official key names. A tensor depends on the seed and its key alone.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE, ModelConfig, StackConfig, tensor_shapes

STANDARD_DEVIATION = 0.02
EMBEDDING_DEVIATION = 1.0
STEP_RANGE = (1e-3, 1e-1)  # of Mamba-2's Δ, spread over its logarithm
DECAY_RANGE = (1.0, 16.0)  # of −A
_OF_SYMBOLS = ("embeddings.weight", "lm_head.weight")


def initial_parameters(config: ModelConfig, seed: int, vocabulary: int = VOCAB_SIZE) -> dict[str, Tensor]:
    """Every tensor of the model, fp32 on the CPU; embeddings and head are of `vocabulary` symbols.

    Projections are normal with deviation 0.02, those that write to a residual stream divided by the root of how many of
    the stack do (what the paper calls a normal GPT-like start); the router begins as the identity, so that p is half
    the unlikeness of neighbours; `residual_proj` begins as nothing, so that a decoder first sees what came through the
    inner network (section 3.3 of arXiv 2507.07955); Mamba-2's own as its authors begin them.
    """
    shapes = tensor_shapes(config) | {
        key: (vocabulary, config.d_model) for key in _OF_SYMBOLS if key in tensor_shapes(config)
    }
    return {key: _tensor(config, key, shape, seed) for key, shape in shapes.items()}


def _tensor(config: ModelConfig, key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    parent, _, name = key.rpartition(".")
    module = parent.rpartition(".")[2]

    def normal(deviation: float) -> Tensor:
        return torch.empty(shape).normal_(0.0, deviation, generator=random)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=random)

    if module.startswith(("norm", "rmsnorm")) or name == "D":
        return torch.ones(shape)
    if name == "A_log":
        return uniform(*DECAY_RANGE).log_()
    if name == "dt_bias":
        step = uniform(math.log(STEP_RANGE[0]), math.log(STEP_RANGE[1])).exp_()
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    if module == "conv1d":
        reach = 1 / math.sqrt(_taps(config, key, shape))
        return uniform(-reach, reach)
    if module in ("q_proj_layer", "k_proj_layer"):
        return torch.eye(shape[0])
    if module == "residual_proj" or name == "pad_dimension":
        return torch.zeros(shape)
    if key == "embeddings.weight":
        return normal(EMBEDDING_DEVIATION)
    if module in ("out_proj", "fc2"):
        return normal(STANDARD_DEVIATION / math.sqrt(_writers(_stack(config, key))))
    return normal(STANDARD_DEVIATION)


def _taps(config: ModelConfig, key: str, shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) == 3 else tensor_shapes(config)[key.replace(".bias", ".weight")][-1]


def _stack(config: ModelConfig, key: str) -> StackConfig:
    prefix = key.partition(".layers.")[0]
    return next(stack for stage in config.stages for stack in stage.stacks if stack.prefix == prefix)


def _writers(stack: StackConfig) -> int:
    """Projections of a stack that write to its residual stream."""
    return sum(2 if layer.has_mlp else 1 for layer in stack.layers)
