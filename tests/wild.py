"""A small model that knows nothing, and loves the bytes that make or break characters."""

from __future__ import annotations

from functools import cache

import torch

from hnet_runtime.config import ModelConfig, tensor_shapes

DOCUMENT = {
    "arch_layout": ["m1", ["T1"], "m1"],
    "d_model": [64, 64],
    "d_intermediate": [0, 128],
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 16, "expand": 2},
    "attn_cfg": {"num_heads": [4, 4], "rotary_emb_dim": [16, 16], "window_size": [-1, -1]},
}


@cache
def wild() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Its configuration and its weights."""
    config = ModelConfig.from_dict(DOCUMENT)
    generator = torch.Generator().manual_seed(3)
    weights = {key: torch.randn(shape, generator=generator) / 8 for key, shape in tensor_shapes(config).items()}
    weights["lm_head.weight"][0x80:] *= 3
    return config, weights
