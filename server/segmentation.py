"""Where a model cut a text, as JSON: what `POST /v1/segment` and `hnet segment --json` give.

Knows the verdicts of an engine; not who asked, nor how the text got in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hnet_runtime.engine.messages import Chunk


def segmentation(model: str, chunks: Sequence[Chunk], num_bytes: int, num_stages: int) -> dict[str, Any]:
    """The chunks of a text of `num_bytes` bytes, BOS included, for each of a model's stages but the innermost one."""
    return {
        "object": "segmentation",
        "model": model,
        "input_bytes": num_bytes,
        "stages": [_stage(stage, chunks, num_bytes) for stage in range(1, num_stages)],
        "usage": {"prompt_tokens": num_bytes, "completion_tokens": 0, "total_tokens": num_bytes},
    }


def _stage(stage: int, chunks: Sequence[Chunk], num_bytes: int) -> dict[str, Any]:
    """Chunks of one stage, 1…S, in order of their byte offsets; BOS is offset 0."""
    opened = sorted((chunk.start, chunk.p) for chunk in chunks if chunk.stage == stage)
    return {
        "stage": stage,
        "boundaries": [start for start, _ in opened],
        "probabilities": [p for _, p in opened],
        "bytes_per_chunk": num_bytes / len(opened) if opened else None,
    }
