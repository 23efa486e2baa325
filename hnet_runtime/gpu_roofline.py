"""What a step must read, multiply and launch on a GPU, and the bytes a second that follow from the GPU's data sheet.

Knows shapes, counts and rates; no tensor, no device, no clock: all of it is computed, nothing measured. A step takes
what its memory traffic takes at full bandwidth, or its products at full speed where those take longer, and a fixed time
for every launch in a replayed graph. Activations stay in the cache, and padding rows read what is in it already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from hnet_runtime.config import VOCAB_SIZE, ModelConfig, StackConfig, StageConfig, stage_tensor_shapes
from hnet_runtime.engine.planning import Curve, Planner

Kind = tuple[int, bool]
"""(stage, parks): a step begins at a stage; rows that open a chunk there wait, or go through."""

LaunchesOf = Callable[[Kind, int], int]
"""Kernels that a step launches, by its kind and rows, padding included."""


@dataclass(frozen=True)
class Gpu:
    """By its data sheet: bytes/s of memory, and FLOP/s of dense products in bf16 (tensor cores) and fp32."""

    name: str
    bandwidth: float
    bf16: float = 989e12
    fp32: float = 67e12


H100 = Gpu("H100 SXM", 3.35e12)
H200 = Gpu("H200 SXM", 4.8e12)

LAUNCH_SECONDS = 2e-6  # assumed of a kernel in a replayed graph: from the end of one to the start of the next
CONTEXT = 2048  # bytes that each row has read
BYTES_PER_CHUNK = {1: 4.7, 2: 7.0}  # of the main network, by routed stages: about what English takes

_IN_FP32 = (
    *("norm1.weight", "norm2.weight", ".norm.weight", "rmsnorm.weight", "dt_bias", "A_log", "mixer.D"),
    *("conv1d.weight", "conv1d.bias", "q_proj_layer.weight", "k_proj_layer.weight", "residual_proj.weight"),
    "residual_proj.bias",
)
_ON_THE_WAY_UP = (".decoder.", ".residual_proj.")


# ── what is read ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step moves, and operations of its products, 2 a weight and row, in the model's dtype and in fp32."""

    weights: float = 0.0
    fp32_weights: float = 0.0
    state: float = 0.0
    kv: float = 0.0
    flops: float = 0.0
    fp32_flops: float = 0.0

    @property
    def bytes(self) -> float:
        return self.weights + self.fp32_weights + self.state + self.kv

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine + theirs for mine, theirs in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> tuple[float, ...]:
        return (self.weights, self.fp32_weights, self.state, self.kv, self.flops, self.fp32_flops)


def boundary_rates(config: ModelConfig, bytes_per_chunk: Sequence[float] | None = None) -> tuple[float, ...]:
    """Share of each routed stage's positions that open a chunk. bytes_per_chunk: of the main network, all stages
    chunking alike, or positions in a chunk for each routed stage. Raises ValueError for another number of them."""
    routed = config.num_routed_stages
    given = tuple(bytes_per_chunk or (BYTES_PER_CHUNK.get(routed, BYTES_PER_CHUNK[2]),))
    if len(given) == 1 and routed > 1:
        given = (given[0] ** (1 / routed),) * routed
    if routed and len(given) != routed:
        raise ValueError(f"{len(given)} chunk lengths for {routed} routed stages")
    if min(given) < 1:
        raise ValueError(f"a chunk has at least one position, not {min(given)}")
    return tuple(1 / each for each in given[:routed])


class Shapes:
    """A model at given boundary rates, every row having read `context` bytes. element: bytes of the model's dtype."""

    def __init__(self, config: ModelConfig, rates: Sequence[float], context: int = CONTEXT, element: int = 2) -> None:
        self.config, self.rates, self.element = config, tuple(rates), element
        self.main = config.num_routed_stages
        self._reaching = [math.prod(self.rates[:stage]) for stage in range(self.main + 1)]
        self._context = [context * share for share in self._reaching]
        self._weights = _weights(config)

    def traffic(self, kind: Kind, rows: int, bucket: int | None = None) -> Traffic:
        """Of a step of so many rows, expected; its products are those of `bucket` rows, padding included."""
        stage, parks = kind
        parks = parks and stage < self.main
        deepest = stage if parks else self.main
        finishing = rows * (1 - self.rates[stage]) if parks else rows
        found = Traffic()
        for index in range(stage, deepest + 1):  # down
            reaching = rows * self._reaching[index] / self._reaching[stage]
            found += self._part(index, "down", reaching, bucket or rows)
        for index in range(min(deepest + 1, self.main)):  # and up
            below = index <= stage
            reaching = finishing if below else rows * self._reaching[index] / self._reaching[stage]
            found += self._part(index, "up", reaching, bucket or rows)
        return found + self._outside(stage, rows, bucket or rows)

    def _part(self, index: int, way: Literal["down", "up"], rows: float, bucket: int) -> Traffic:
        numbers, fp32_numbers, products, fp32_products = self._weights[index, way]
        stage = self.config.stages[index]
        stack = stage.stacks[-1 if way == "up" else 0]
        state, kv = self._memory(stage, stack)
        if way == "down":  # the router's vector of the last position
            state += 0 if stage.is_main else 2 * stage.d_model * self.element
        else:  # the value that is smoothed
            state += 2 * stage.d_model * 4
        return Traffic(
            numbers * self.element,
            fp32_numbers * 4,
            rows * state,
            rows * kv,
            2 * products * bucket,
            2 * fp32_products * bucket,
        )

    def _memory(self, stage: StageConfig, stack: StackConfig) -> tuple[int, float]:
        """Bytes of a row's fixed-size state that one position of a stack reads and writes, and of its keys."""
        state, kv = 0, 0.0
        for layer in stack.layers:
            if layer.mixer == "mamba2":
                assert stage.mamba2 is not None
                ssm = stage.mamba2
                conv = (ssm.d_conv - 1) * ssm.conv_channels * self.element
                state += 2 * (conv + ssm.d_inner * ssm.d_state * 4)
            else:
                assert stage.attention is not None
                window = stage.attention.window
                seen = self._context[stage.index]
                seen = min(seen, window + 1) if window >= 0 else seen
                kv += 2 * stage.d_model * self.element * (seen + 1)  # read, and this position's written
        return state, kv

    def _outside(self, stage: int, rows: int, bucket: int) -> Traffic:
        """Embeddings of the rows' bytes, where it begins with bytes, and the head."""
        head = VOCAB_SIZE * self.config.d_model
        embedded = 0 if stage else rows * self.config.d_model
        return Traffic(weights=(head + embedded) * self.element, flops=2 * head * bucket)


@cache
def _weights(config: ModelConfig) -> dict[tuple[int, str], tuple[int, int, int, int]]:
    """By stage and way: numbers in the model's dtype and in fp32, and those of them that are in matrices."""
    found = {(stage.index, way): [0, 0, 0, 0] for stage in config.stages for way in ("down", "up")}
    for stage, key, shape in stage_tensor_shapes(config):
        own = key.removeprefix(stage.prefix)
        way = "up" if not stage.is_main and own.startswith(_ON_THE_WAY_UP) else "down"
        fp32 = key.endswith(_IN_FP32)
        count = math.prod(shape)
        found[stage.index, way][fp32] += count
        if len(shape) == 2:
            found[stage.index, way][2 + fp32] += count
    return {place: (a, b, c, d) for place, (a, b, c, d) in found.items()}


# ── what it takes ─────────────────────────────────────────────────────────────────────────────


def step_seconds(traffic: Traffic, launches: int, gpu: Gpu, launch_seconds: float = LAUNCH_SECONDS) -> float:
    """Weights in one dtype are read while their products run; state and keys come on top, and every launch."""
    weights = max(traffic.weights / gpu.bandwidth, traffic.flops / gpu.bf16)
    weights += max(traffic.fp32_weights / gpu.bandwidth, traffic.fp32_flops / gpu.fp32)
    return weights + (traffic.state + traffic.kv) / gpu.bandwidth + launches * launch_seconds


def lockstep_rate(shapes: Shapes, rows: int, gpu: Gpu, launches: LaunchesOf, launch_seconds: float) -> float:
    """Bytes a second where every step is a captured one through all stages: it reads all weights whoever opens a
    chunk, since its shapes do not depend on that."""
    return rows / _seconds(shapes, (0, False), rows, gpu, launches, launch_seconds)


def aligned_rate(shapes: Shapes, rows: int, gpu: Gpu, launches: LaunchesOf, launch_seconds: float) -> float:
    """Bytes a second where rows that open a chunk wait until it is best to run the next stage for them, boundaries
    being independent (`planning.Planner`)."""
    parked: list[Curve] = [
        np.array(
            [0.0]
            + [
                _seconds(shapes, (stage, stage < shapes.main), count, gpu, launches, launch_seconds)
                for count in range(1, rows + 1)
            ]
        )
        for stage in range(shapes.main + 1)
    ]
    return Planner(parked, shapes.rates, parked=parked).parked_rate(rows)


def _seconds(shapes: Shapes, kind: Kind, rows: int, gpu: Gpu, launches: LaunchesOf, launch_seconds: float) -> float:
    return step_seconds(shapes.traffic(kind, rows), launches(kind, rows), gpu, launch_seconds)


def launches_of(config: ModelConfig, element: int = 2) -> LaunchesOf:
    """Counted from the steps of the model themselves; see `gpu_tape`. ImportError where there is no Triton."""
    import torch

    from hnet_runtime.gpu_tape import tape
    from hnet_runtime.model.captured import StepKey

    dtype = torch.bfloat16 if element == 2 else torch.float32
    # How many there are does not depend on the rows: those of two stand for all.
    return lambda kind, rows: tape(config, StepKey(2, *kind), dtype).launches


def expected_rate(
    config: ModelConfig,
    rows: int,
    *,
    bandwidth: float = H100.bandwidth,
    policy: Literal["lockstep", "aligned"] = "lockstep",
    bytes_per_chunk: Sequence[float] | None = None,
    context: int = CONTEXT,
    element: int = 2,
    launch_seconds: float = LAUNCH_SECONDS,
    launches: LaunchesOf | None = None,
) -> float:
    """Bytes a second of so many decoding rows on a GPU of that memory bandwidth (bytes/s), computed, not measured.

    The products' speeds are an H100's. launches: counted from the captured steps where not given. Raises ValueError for
    no rows or chunk lengths that do not fit the model; ImportError where launches are to be counted without Triton.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; at least one decodes")
    shapes = Shapes(config, boundary_rates(config, bytes_per_chunk), context, element)
    gpu = Gpu("", bandwidth, H100.bf16 if element == 2 else H100.fp32)
    rate = lockstep_rate if policy == "lockstep" else aligned_rate
    return rate(shapes, rows, gpu, launches or launches_of(config, element), launch_seconds)
