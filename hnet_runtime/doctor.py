"""What this machine makes of a model: is the runtime right here, and how long do its steps take?

Brings together the machine, the loaded weights and the checks of parity.py. Knows no requests and
no HTTP; gives figures and leaves the telling to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.comparison import Check
from hnet_runtime.config import BOS, stage_tensor_shapes
from hnet_runtime.engine.building import choose_device, choose_dtype, choose_library, choose_prefill, default_threads
from hnet_runtime.engine.config import DType, EngineConfig, Kernels
from hnet_runtime.machine import Machine, inspect_machine
from hnet_runtime.ops.native.library import available
from hnet_runtime.ops.triton.libraries import Choice
from hnet_runtime.parity import StepTime, check_runtime

TEXT = (
    "It was late when the ferry came in. “Forty-two crates,” said the clerk, counting twice; "
    "nobody answered. Über den Hügeln zog der Nebel; 川の音だけが聞こえた。 "
    "for crate in crates: total += crate.weight * 0.5  # in kg"
).encode()
# The reference recomputes everything for every text: a model of more parameters is checked on fewer bytes.
_LARGE, _LARGE_BYTES = 100_000_000, 64


# What a forward and a decoding step are made of. Operations on weights say how those are held.
_WEIGHTED = ("matrix products of blocks", "router", "residual projection", "head")
_OPERATIONS = (
    *("embedding", "RMS norm + residual", "convolution", "Mamba-2 state", "gated norm"),
    *("rotary + KV append + attention", "SwiGLU", "EMA", *_WEIGHTED),
)


@dataclass(frozen=True)
class Operation:
    """A line of the dispatch table: `code` is what runs it, with the arithmetic where weights are read."""

    name: str
    code: str


@dataclass(frozen=True)
class InstructionSet:
    """A native library: whether it can serve here, whether it does, and why it cannot or what is odd."""

    name: str
    runnable: bool
    serves: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `hnet doctor` says.

    `kernels` is the code that serves, as in EngineInfo, and `dispatch` says so for each operation. `stage_bytes` are
    the weights of each stage as loaded, `embedding_bytes` those of embeddings and head, `served_bytes` all of them as
    the code that serves holds them. `prefill_on_cuda` is what a CUDA device reads prompts with, or would if
    one was here, by the packages that are installed. The checks ran over `checked_bytes` bytes.
    """

    machine: Machine
    model: str
    parameters: int
    device: str
    dtype: str
    kernels: str
    threads: int
    load_seconds: float
    embedding_bytes: int
    stage_bytes: tuple[int, ...]
    served_bytes: int
    instruction_sets: tuple[InstructionSet, ...]
    dispatch: tuple[Operation, ...]
    prefill_on_cuda: tuple[Choice, ...]
    checked_bytes: int
    checks: tuple[Check, ...]
    steps: tuple[StepTime, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def examine(
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    kernels: Kernels = "auto",
    quantization: Literal["int8"] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Loads a model as `Engine.from_pretrained` does, and checks it.

    A failed check is a finding, no exception; raises what loading raises. Sets PyTorch's threads
    for the process, as an engine does.
    """
    started = time.perf_counter()
    engine_config = EngineConfig(kernels=kernels, quantization=quantization, threads=threads)
    source = locate(model, config, revision)
    target = choose_device(device)
    library = choose_library(engine_config, target)
    chosen = choose_dtype(dtype, source, target)
    weights = load_weights(source, dtype=chosen, device=target, progress=progress)
    load_seconds = time.perf_counter() - started
    if target.type == "cpu":
        torch.set_num_threads(threads or default_threads(source.config))
    data = bytes([BOS]) + TEXT
    if source.config.num_parameters > _LARGE:
        data = data[:_LARGE_BYTES]
    findings = check_runtime(source.config, weights, data, engine_config, library)
    stage_bytes = [0] * len(source.config.stages)
    for stage, key, _ in stage_tensor_shapes(source.config):
        stage_bytes[stage.index] += weights[key].nbytes
    dtype_name = str(chosen).removeprefix("torch.")
    return Diagnosis(
        machine=inspect_machine(),
        model=source.name,
        parameters=source.config.num_parameters,
        device=str(target),
        dtype=dtype_name,
        kernels=findings.kernels,
        threads=torch.get_num_threads(),
        load_seconds=load_seconds,
        embedding_bytes=sum(tensor.nbytes for tensor in weights.values()) - sum(stage_bytes),
        stage_bytes=tuple(stage_bytes),
        served_bytes=findings.served_bytes,
        instruction_sets=tuple(
            InstructionSet(each.isa, each.runnable, library is not None and library.isa == each.isa, each.reason)
            for each in available()
        ),
        dispatch=dispatch_table(
            findings.kernels if library is None else f"native {library.isa}", dtype_name, quantization
        ),
        prefill_on_cuda=tuple(choose_prefill(kernels, torch.device("cuda")).values()),
        checked_bytes=len(data),
        checks=findings.checks,
        steps=findings.steps,
    )


def dispatch_table(code: str, dtype: str, quantization: str | None) -> tuple[Operation, ...]:
    """What runs each operation of a model; an engine takes one path for all of them, but on a GPU what reads weights is
    torch's."""
    native = code.startswith("native")
    activations = "float32" if native else dtype
    held = dict.fromkeys(_WEIGHTED, f"{dtype} weights, {activations} activations")
    if quantization is not None:
        held["matrix products of blocks"] = f"{quantization} weights and activations"
    # Boundaries hang on these two: fp32 arithmetic on every path, and the projection's weights as well.
    held["router"] = f"{dtype} weights, float32 activations"
    held["residual projection"] = "float32 weights and activations"
    by_torch = () if native else ("embedding", *held)
    lines = [
        Operation(name, ", ".join(["torch" if name in by_torch else code, *([held[name]] if name in held else [])]))
        for name in _OPERATIONS
    ]
    return (*lines, Operation("sampler", f"{code}, float64"))
