"""What this machine makes of a model: is the runtime right here, and how long do its steps take?

Brings together the machine, the loaded weights and the checks of parity.py. Knows no requests and
no HTTP; gives figures and leaves the telling to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.config import BOS, stage_tensor_shapes
from hnet_runtime.engine.engine import DType, choose_device, choose_dtype, default_threads
from hnet_runtime.machine import Machine, inspect_machine
from hnet_runtime.parity import Check, StepTime, check_runtime

TEXT = (
    "It was late when the ferry came in. “Forty-two crates,” said the clerk, counting twice; "
    "nobody answered. Über den Hügeln zog der Nebel; 川の音だけが聞こえた。 "
    "for crate in crates: total += crate.weight * 0.5  # in kg"
).encode()
# The reference recomputes everything for every text: a model of more parameters is checked on fewer bytes.
_LARGE, _LARGE_BYTES = 100_000_000, 64


@dataclass(frozen=True)
class Diagnosis:
    """Everything `hnet doctor` says.

    `path` is the implementation that serves; `stage_bytes` are the weights of each stage and
    `embedding_bytes` those of embeddings and head; the checks ran over `checked_bytes` bytes.
    """

    machine: Machine
    model: str
    parameters: int
    device: str
    dtype: str
    path: str
    threads: int
    load_seconds: float
    embedding_bytes: int
    stage_bytes: tuple[int, ...]
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
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Loads a model as `Engine.from_pretrained` does, and checks it.

    A failed check is a finding, no exception; raises what loading raises. Sets PyTorch's threads
    for the process, as an engine does.
    """
    started = time.perf_counter()
    source = locate(model, config, revision)
    target = choose_device(device)
    chosen = choose_dtype(dtype, source, target)
    weights = load_weights(source, dtype=chosen, device=target, progress=progress)
    load_seconds = time.perf_counter() - started
    if target.type == "cpu":
        torch.set_num_threads(threads or default_threads(source.config))
    data = bytes([BOS]) + TEXT
    if source.config.num_parameters > _LARGE:
        data = data[:_LARGE_BYTES]
    checks, steps = check_runtime(source.config, weights, data)
    stage_bytes = [0] * len(source.config.stages)
    for stage, key, _ in stage_tensor_shapes(source.config):
        stage_bytes[stage.index] += weights[key].nbytes
    return Diagnosis(
        machine=inspect_machine(),
        model=source.name,
        parameters=source.config.num_parameters,
        device=str(target),
        dtype=str(chosen).removeprefix("torch."),
        path="torch",
        threads=torch.get_num_threads(),
        load_seconds=load_seconds,
        embedding_bytes=sum(tensor.nbytes for tensor in weights.values()) - sum(stage_bytes),
        stage_bytes=tuple(stage_bytes),
        checked_bytes=len(data),
        checks=checks,
        steps=steps,
    )
