"""The models that checks run: one on the device, with captured steps or eager ones, and texts to read.

Knows checkpoints and devices; not what is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

import torch
from torch import Tensor

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.checkpoint.load import parameter_dtype
from hnet_runtime.checkpoint.random_weights import random_tensor
from hnet_runtime.config import BOS, ModelConfig, tensor_shapes
from hnet_runtime.engine.graphs import Captures, StepGraphs
from hnet_runtime.gpu_doctor.checks import Settings
from hnet_runtime.gpu_doctor.device import Device
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.state.arenas import ModelState

EVERY_KIND = ModelConfig.from_dict(
    {
        "arch_layout": ["m1T1", ["T1", ["T1"], "m1"], "m1"],
        "d_model": [64, 96, 128],
        "d_intermediate": [128, 128, 256],
        "vocab_size": 256,
        "ssm_cfg": {"d_conv": 4, "expand": 2, "d_state": 32, "chunk_size": 64},
        "attn_cfg": {"num_heads": [2, 3, 4], "rotary_emb_dim": [16, 16, 0], "window_size": [9, 70, -1]},
        "tie_embeddings": False,
    }
)
"""A small model with three stages, every kind of layer, rings and pages."""


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The same numbers everywhere, up to rounding."""
    return {key: random_tensor(config, key).to(device, parameter_dtype(key, dtype)) for key in tensor_shapes(config)}


def weights_of(settings: Settings, dtype: torch.dtype, device: torch.device) -> tuple[ModelConfig, dict[str, Tensor]]:
    """MODEL's, the demo model's where there is none."""
    source = locate(settings.model, settings.config)
    return source.config, load_weights(source, dtype=dtype, device=device)


def model_on(
    device: Device,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    captures: Captures | None = None,
    most_graphs: int = 128,
) -> CapturedHNet:
    """A model on the device's kernels; its steps are captured as the device does, or as `captures` says."""
    model = CapturedHNet(
        config, weights, lambda: StepGraphs(captures or device.captures(), most_graphs), device.step_ops()
    )
    model.prefill = device.prefill_ops()
    return model


def rows_of(model: CapturedHNet, count: int, positions: int) -> ModelState:
    """Rows 1 … count, each with pages for so many positions."""
    state = model.new_state(num_rows=count, kv_positions=count * (positions + 64), max_positions=positions)
    for pool in state.page_pools:
        for row in range(1, count + 1):
            pool.reserve(row, positions)
    state.reset(list(range(1, count + 1)))
    return state


def texts(count: int, length: int) -> list[bytes]:
    """So many texts of so many bytes, BOS first: our own sources, which are there wherever this runs."""
    files = sorted(resources.files("hnet_runtime.engine").iterdir(), key=lambda each: each.name)
    source = b"".join(each.read_bytes() for each in files if each.name.endswith(".py"))
    while len(source) < count * length:
        source += source
    return [bytes([BOS]) + source[index * length : (index + 1) * length - 1] for index in range(count)]
