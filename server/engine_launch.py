"""Makes the real engine. Called where the engine runs; the API process never imports this file.

The one place of the server that touches the runtime's tensors, and only by their owner's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.engine_loop import Progress
from server.settings import DType

if TYPE_CHECKING:
    from hnet_runtime import Engine


def load_engine(
    *,
    model: str | None,
    config: str | None,
    revision: str | None,
    device: str,
    dtype: DType,
    progress: Progress | None = None,
    **engine_options: Any,
) -> Engine:
    """`Engine.from_pretrained` with those options of EngineConfig that are set."""
    from hnet_runtime import Engine, EngineConfig

    chosen = {name: value for name, value in engine_options.items() if value is not None}
    return Engine.from_pretrained(
        model,
        config=config,
        revision=revision,
        device=device,
        dtype=dtype,
        engine_config=EngineConfig(**chosen),
        progress=progress,
    )
