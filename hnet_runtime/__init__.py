"""hnet-serve's runtime: runs H-Nets exactly and batched. Knows bytes, rows and tensors.

`Engine`, `SamplingParams` and `ModelConfig` are loaded on first use, so that importing
the message types alone (as the API process does) never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hnet_runtime.config import ModelConfig
    from hnet_runtime.engine.config import EngineConfig
    from hnet_runtime.engine.engine import Engine
    from hnet_runtime.engine.messages import Output, Request, SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "EngineConfig", "ModelConfig", "Output", "Request", "SamplingParams"]

_HOMES = {
    "Engine": "hnet_runtime.engine.engine",
    "EngineConfig": "hnet_runtime.engine.config",
    "ModelConfig": "hnet_runtime.config",
    "Output": "hnet_runtime.engine.messages",
    "Request": "hnet_runtime.engine.messages",
    "SamplingParams": "hnet_runtime.engine.messages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
