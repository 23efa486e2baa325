"""Where a run stands, on disk: written so that a kill at any moment leaves one whole state to go on from.

Knows files, tensors by name and a run's counters. Everything is safetensors and JSON: reading a state executes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_PREFIX = "state-"
KEPT = 2


class StateError(ValueError):
    """A state that this run cannot go on from."""


@dataclass(frozen=True)
class Counters:
    """step: optimizer's steps done; seen: bytes of windows they saw; seconds: of work, over all sittings; settings:
    those that decide the curve, by name. Data are a function of `step`, and nothing else in a run is random."""

    step: int
    seen: int
    seconds: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class State:
    counters: Counters
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]


def save(folder: Path, state: State) -> Path:
    """Writes a state beside the older ones, and removes all but the newest `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_PREFIX}{state.counters.step:09d}"
    if target.exists():
        return target
    unfinished = folder / f"unfinished-{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_file(state.parameters, unfinished / "model.safetensors")
    save_file(state.moments, unfinished / "optimizer.safetensors")
    (unfinished / "counters.json").write_text(json.dumps(asdict(state.counters), indent=1) + "\n", encoding="utf-8")
    for file in unfinished.iterdir():
        _to_disk(file)
    unfinished.rename(target)
    _to_disk(folder)
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> State | None:
    """The newest state below `folder`, or None. Raises StateError naming the file that cannot be read."""
    states = _states(folder)
    if not states:
        return None
    path = states[-1]
    try:
        counters = Counters(**json.loads((path / "counters.json").read_text(encoding="utf-8")))
        parameters = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except Exception as error:
        raise StateError(f"{path}: cannot be read: {error}") from error
    return State(counters, parameters, moments)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's averages under `KEY.exp_avg` and `KEY.exp_avg_sq`, and its count of steps under `KEY.step`."""
    return {
        f"{key}.{name}": value.detach().clone()
        for group in optimizer.param_groups
        for key, parameter in zip(group["names"], group["params"], strict=True)
        for name, value in optimizer.state[parameter].items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """The opposite of `moments_of`. Raises StateError naming a parameter that has none."""
    for group in optimizer.param_groups:
        for key, parameter in zip(group["names"], group["params"], strict=True):
            state = {name: moments.get(f"{key}.{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
            if any(value is None for value in state.values()):
                raise StateError(f"the state has nothing of the optimizer's for {key}")
            optimizer.state[parameter] = state


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "counters.json").is_file())


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
