"""What can be set of an engine. Knows names and ranges; no torch, no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "native", "torch"]
TRAINING_CONTEXT = 8192  # bytes; the released models saw no longer ones


class EngineError(ValueError):
    """An engine that cannot be built as asked; the message names the setting."""


@dataclass(frozen=True)
class EngineConfig:
    """Memory and batching of one engine.

    max_num_seqs: rows that run at once; None is 64 on a CPU, 256 on CUDA.
    max_model_len: bytes of prompt and completion together, the most one request may have.
    prefill_bytes_per_tick: bytes of prompts that run between two steps of the decoding rows (eight times as many
        while no row decodes).
    kv_memory: bytes for the keys and values of full-attention stages; None takes what
        max_num_seqs rows of max_model_len would need, but no more than a quarter of the memory.
    threads: CPU threads; None decides by the model's width.
    kernels: `native` or `torch` on a CPU; `auto` takes native ones where they are built.
    quantization: `int8` runs the blocks' matrix products in 8 bits (native kernels only).
    weight_cache: directory for packed weights of large models, which are mapped from there the next time; `off` keeps
        none; None takes HNET_WEIGHT_CACHE or the user's cache directory.
    """

    max_num_seqs: int | None = None
    max_model_len: int = TRAINING_CONTEXT
    prefill_bytes_per_tick: int = 64
    kv_memory: int | None = None
    threads: int | None = None
    kernels: Kernels = "auto"
    quantization: Literal["int8"] | None = None
    weight_cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "prefill_bytes_per_tick", "kv_memory", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{name} must be at least 1, not {value}")
        if self.kernels not in ("auto", "native", "torch"):
            raise EngineError(f"kernels must be auto, native or torch, not {self.kernels!r}")
        if self.quantization not in (None, "int8"):
            raise EngineError(f"quantization must be int8, not {self.quantization!r}")
