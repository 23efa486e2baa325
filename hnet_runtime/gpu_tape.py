"""How many kernels a step launches: the static step itself, run on tensors without memory, with every launch listed.

Knows models and what launches; no device, no seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hnet_runtime.config import ModelConfig, tensor_shapes
from hnet_runtime.engine.graphs import Eager, StepGraphs
from hnet_runtime.model.captured import CapturedHNet, StepKey
from hnet_runtime.model.step_buffers import StepBuffers
from hnet_runtime.model.step_ops import StepOps

MAX_POSITIONS = 8192  # of a row; beyond some number attention is launched in more pieces
_PRODUCTS = frozenset({"mm", "addmm"})
_NO_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})


@dataclass(frozen=True)
class Tape:
    """Launches of one step: ours by name, torch's matrix products, and what else of torch launches a kernel."""

    ours: Mapping[str, int]
    products: int
    others: int

    @property
    def launches(self) -> int:
        return sum(self.ours.values()) + self.products + self.others


@lru_cache(maxsize=512)
def tape(config: ModelConfig, key: StepKey, dtype: torch.dtype = torch.bfloat16) -> Tape:
    """What the step of a model launches on CUDA with Triton. Raises ImportError where there is no Triton.

    An operation of torch that is no view and no allocation counts as one launch: a few take more, none takes less.
    """
    from hnet_runtime.ops.triton.launching import recording

    step = _step(config, key.bucket, dtype)
    counting = _Counting()
    with torch.no_grad():
        with recording():
            step.run(key.bucket, key.stage, key.parks)  # as before a capture: tables that are kept are made now
        with counting, recording() as launches:
            step.run(key.bucket, key.stage, key.parks)
    ours = Counter(launch.name for launch in launches if all(launch.grid))
    products = sum(counting.ran[name] for name in _PRODUCTS)
    return Tape(ours, products, counting.ran.total() - products)


def _step(config: ModelConfig, bucket: int, dtype: torch.dtype) -> Any:
    weights = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in tensor_shapes(config).items()}
    model = CapturedHNet(config, weights, lambda: StepGraphs(Eager()), StepOps.triton())
    state = model.new_state(num_rows=bucket, kv_positions=bucket * MAX_POSITIONS, max_positions=MAX_POSITIONS)
    return model.static_step(state, StepBuffers(state, bucket))


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            self.ran[name] += 1
        return func(*args, **(kwargs or {}))
