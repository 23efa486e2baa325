"""What can be set of an engine. Knows names and ranges; no torch, no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DType = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "native", "torch", "triton", "libraries"]
Batching = Literal["lockstep", "aligned", "adaptive"]
TRAINING_CONTEXT = 8192  # bytes; the released models saw no longer ones


class EngineError(ValueError):
    """An engine that cannot be built as asked; the message names the setting."""


@dataclass(frozen=True)
class EngineConfig:
    """Memory and batching of one engine.

    max_num_seqs: rows that run at once; None is 64 on a CPU, 256 on CUDA.
    max_model_len: bytes of prompt and completion together, the most one request may have.
    batching: when rows that open a chunk run the stages above: `lockstep` at once; `aligned` when nobody can run or
        most rows wait; `adaptive` as measured costs say.
    max_park_ticks, max_park_seconds: the longest that a row waits so.
    prefill_bytes_per_tick: bytes of prompts that run between two steps of the decoding rows (eight times as many
        while no row decodes).
    prefill_share: most of the time that prompts may take while rows decode (0–1).
    prefix_cache_memory: bytes for snapshots of prefixes that prompts share; 0 keeps none, None takes an eighth of the
        memory, at most 8 GiB.
    prefix_cache_interval: bytes of a prompt between two snapshots, besides those at its end and where prompts
        diverge; None is 64 where a snapshot is small, more where it is not.
    kv_memory: bytes for the keys and values of full-attention stages; None takes what
        max_num_seqs rows of max_model_len would need, but no more than a quarter of the memory.
    threads: CPU threads; None decides by the model's width.
    kernels: `native` or `torch` on a CPU, `triton` or `torch` on a GPU; `auto` takes the former where they are there.
        `libraries` is `triton` with other projects' kernels for what they compute of prompts, where they are installed:
        a row's numbers then depend on how its prompt is cut.
    quantization: `int8` runs the blocks' matrix products in 8 bits (native kernels only).
    weight_cache: directory for packed weights of large models, which are mapped from there the next time; `off` keeps
        none; None takes HNET_WEIGHT_CACHE or the user's cache directory.
    enforce_eager: on a GPU, runs steps operation by operation instead of replaying captured graphs.
    max_graphs: most steps that are captured; fewer have rows run with more padding.
    overlap: where steps are captured graphs, the device is given the next one before the last one's bytes are read,
        wherever it is known what that is; None is on on CUDA.
    gpu_memory_utilization: share of a GPU's memory that weights, rows, keys and values may take together (0–1).
    debug_checks: checks after every tick, not only when idle, that no row and no page is lost.
    """

    max_num_seqs: int | None = None
    max_model_len: int = TRAINING_CONTEXT
    batching: Batching = "adaptive"
    max_park_ticks: int = 64
    max_park_seconds: float = 1.0
    prefill_bytes_per_tick: int = 64
    prefill_share: float = 0.5
    prefix_cache_memory: int | None = None
    prefix_cache_interval: int | None = None
    kv_memory: int | None = None
    threads: int | None = None
    kernels: Kernels = "auto"
    quantization: Literal["int8"] | None = None
    weight_cache: str | None = None
    enforce_eager: bool = False
    max_graphs: int = 128
    overlap: bool | None = None
    gpu_memory_utilization: float = 0.9
    debug_checks: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_model_len", 1),
            ("max_park_ticks", 1),
            ("prefill_bytes_per_tick", 1),
            ("prefix_cache_memory", 0),
            ("prefix_cache_interval", 1),
            ("kv_memory", 1),
            ("threads", 1),
            ("max_graphs", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EngineError(f"{name} must be at least {least}, not {value}")
        if not self.max_park_seconds > 0:
            raise EngineError(f"max_park_seconds must be above 0, not {self.max_park_seconds}")
        if not 0 < self.prefill_share <= 1:
            raise EngineError(f"prefill_share must be above 0 and at most 1, not {self.prefill_share}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise EngineError(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.batching not in ("lockstep", "aligned", "adaptive"):
            raise EngineError(f"batching must be lockstep, aligned or adaptive, not {self.batching!r}")
        if self.kernels not in get_args(Kernels):
            raise EngineError(f"kernels must be auto, native, torch, triton or libraries, not {self.kernels!r}")
        if self.quantization not in (None, "int8"):
            raise EngineError(f"quantization must be int8, not {self.quantization!r}")
