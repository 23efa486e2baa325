"""A model driven without an engine: rows of bytes through `run`, and what the run read.

Knows weights and rows; no requests, no sampling. The bytes fed are arbitrary, since time does not depend on them
where an override decides what opens a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.config import ModelConfig, stage_tensor_shapes
from hnet_runtime.engine.building import build_model, choose_dtype, choose_library
from hnet_runtime.engine.config import DType, EngineConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.results import Result
from hnet_runtime.state.rows import PAGE, pages_for

Network = HNet | NativeHNet
BOS = b"\xfe"


@dataclass(frozen=True)
class Variant:
    """How a model runs. bytes_per_chunk: mean bytes in a chunk of the main network, None leaves it to the router."""

    dtype: DType = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    quantization: Literal["int8"] | None = None
    threads: int = 1
    bytes_per_chunk: float | None = None


def override(config: ModelConfig, bytes_per_chunk: float | None) -> RouterOverride | None:
    """Every routed stage chunks alike: with two of them, each at the root of the whole."""
    if bytes_per_chunk is None or not config.num_routed_stages:
        return None
    per_stage = bytes_per_chunk ** (1 / config.num_routed_stages)
    return RouterOverride((per_stage,) * config.num_routed_stages, seed=1)


def read_weights(model: str, dtype: DType) -> tuple[ModelConfig, dict[str, Tensor]]:
    """demo, random:NAME or a directory → its configuration and weights."""
    source = locate(None if model == "demo" else model)
    return source.config, load_weights(source, dtype=choose_dtype(dtype, source, torch.device("cpu")))


def build(config: ModelConfig, weights: Mapping[str, Tensor], variant: Variant) -> Network:
    """The model as `variant` says; `weights` stay as they are."""
    engine_config = EngineConfig(threads=variant.threads, kernels=variant.kernels, quantization=variant.quantization)
    library = choose_library(engine_config, torch.device("cpu"))
    return build_model(
        config, dict(weights), engine_config, library, override=override(config, variant.bytes_per_chunk)
    )


def again(model: Network, weights: Mapping[str, Tensor], variant: Variant) -> Network:
    """The same weights run in another way, shared where they are packed: only threads and chunking may differ."""
    if not isinstance(model, NativeHNet):
        return build(model.config, weights, variant)
    engine_config = EngineConfig(threads=variant.threads, quantization=variant.quantization)
    library = choose_library(engine_config, torch.device("cpu"))
    chunking = override(model.config, variant.bytes_per_chunk)
    return build_model(model.config, {}, engine_config, library, override=chunking, packed=model.packed)


def stage_bytes(model: Network, weights: Mapping[str, Tensor] | None = None) -> list[int]:
    """Bytes of weights that a step of each stage reads. Embeddings are looked up; the head is read with stage 0."""
    held = model.packed if isinstance(model, NativeHNet) else weights
    assert held is not None
    stage_of = {key: stage.index for stage, key, _ in stage_tensor_shapes(model.config)}
    stage_of["embeddings.weight" if model.config.tie_embeddings else "lm_head.weight"] = 0
    if isinstance(model, NativeHNet):
        stage_of["lm_head.weight"] = 0
        stage_of.pop("embeddings.weight", None)
    sizes = [0] * len(model.config.stages)
    for key, tensor in held.items():
        name = key.partition(":")[0]  # an int8 matrix has scales and sums beside it
        if name in stage_of:
            sizes[stage_of[name]] += tensor.nbytes
    return sizes


class Rows:
    """Rows 1…count of a model with room for `positions` bytes each."""

    def __init__(self, model: Network, count: int, positions: int) -> None:
        self.model = model
        self.rows = list(range(1, count + 1))
        self._count, self._positions = count, positions
        self._state = model.new_state(
            num_rows=count, kv_positions=count * pages_for(positions) * PAGE, max_positions=positions
        )
        for pool in self._state.page_pools:
            for row in self.rows:
                pool.reserve(row, positions)
        self._state.reset(self.rows)

    def restart(self) -> None:
        """Every row is empty again."""
        self._state.reset(self.rows)

    def rewind(self, positions: int) -> None:
        """For timings, of a model that opens a chunk with each byte: every row stands after so many bytes again. Only
        counts go back, so that what is computed from there on is not what the bytes say."""
        for stage in self._state.stages:
            stage.positions[self.rows] = positions

    def run(self, pieces: Sequence[bytes], rows: Sequence[int] | None = None, logits: int = 1) -> tuple[float, Result]:
        """Seconds and result of the next bytes of each row (all of them where `rows` is None)."""
        chosen = self.rows if rows is None else rows
        wanted = [logits] * len(chosen)
        started = time.perf_counter()
        result = self.model.run(self._state, chosen, pieces, wanted)
        return time.perf_counter() - started, result


def text(length: int, row: int = 0) -> bytes:
    """BOS and letters, another sequence for each row."""
    return BOS + bytes(97 + (7 * at + at // 5 + 11 * row) % 26 for at in range(length - 1))
