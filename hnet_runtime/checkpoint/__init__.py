"""Checkpoints: where a model's files are, what they hold, and how they become tensors.

Knows files, hub ids and the official key names. Knows nothing of what the tensors compute.
Finding a model (`locate`) needs no torch, so the parts that do are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hnet_runtime.checkpoint.errors import CheckpointError
from hnet_runtime.checkpoint.locate import ModelSource, locate

if TYPE_CHECKING:
    from hnet_runtime.checkpoint.conversion import convert
    from hnet_runtime.checkpoint.load import load_weights, parameter_dtype

__all__ = ["CheckpointError", "ModelSource", "convert", "load_weights", "locate", "parameter_dtype"]

_HOMES = {
    "convert": "hnet_runtime.checkpoint.conversion",
    "load_weights": "hnet_runtime.checkpoint.load",
    "parameter_dtype": "hnet_runtime.checkpoint.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
