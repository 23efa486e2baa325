"""What a model computes for a byte, so that models can be compared at equal compute.

Knows shapes; counts multiplications of products with weights, and those of attention over a window. Norms,
convolutions, scans and routers' comparisons are left out: they are a few per cent.
"""

from __future__ import annotations

from collections.abc import Sequence

from hnet_runtime.config import VOCAB_SIZE, ModelConfig, StageConfig, tensor_shapes


def multiplications_per_byte(
    config: ModelConfig,
    positions_per_chunk: Sequence[float],
    window: int,
    *,
    vocabulary: int = VOCAB_SIZE,
    bytes_per_symbol: float = 1.0,
) -> float:
    """Of a forward; a backward takes twice as many.

    positions_per_chunk: of each routed stage; window: symbols seen at once; bytes_per_symbol: 1 where those are bytes.
    """
    shapes = tensor_shapes(config)
    total = config.d_model * vocabulary / bytes_per_symbol
    bytes_per_position = bytes_per_symbol
    for stage in config.stages:
        weights = sum(
            shape[0] * shape[1] for key, shape in shapes.items() if len(shape) == 2 and _is_of(stage, config, key)
        )
        length = window * bytes_per_symbol / bytes_per_position
        total += (weights + _attention(stage, length)) / bytes_per_position
        if not stage.is_main:
            bytes_per_position *= positions_per_chunk[stage.index]
    return total


def _is_of(stage: StageConfig, config: ModelConfig, key: str) -> bool:
    deeper = [other.prefix for other in config.stages[stage.index + 1 :]]
    return key.startswith(f"{stage.prefix}.") and not any(key.startswith(f"{prefix}.") for prefix in deeper[:1])


def _attention(stage: StageConfig, length: float) -> float:
    """Scores and sums over the keys that a position sees on average."""
    if stage.attention is None:
        return 0.0
    reach = length if stage.attention.window < 0 else min(length, stage.attention.window + 1)
    seen = reach - reach**2 / (2 * length)
    layers = sum(layer.mixer == "attention" for stack in stage.stacks for layer in stack.layers)
    return layers * 2 * stage.d_model * seen
