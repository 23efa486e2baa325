"""A model as it is served: `config.json` and `model.safetensors` under the official key names, in bfloat16.

Knows the two files; D and `residual_proj` stay fp32 in them, as in the released checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hnet_runtime.checkpoint.load import parameter_dtype
from hnet_runtime.config import ModelConfig


def export(
    config: ModelConfig, parameters: Mapping[str, Tensor], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Writes the model into `folder`, each file whole or not at all; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().to(parameter_dtype(key, dtype)).contiguous() for key, tensor in parameters.items()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial)
    os.replace(partial, folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(dict(config.source), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")
    return folder
