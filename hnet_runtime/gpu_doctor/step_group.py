"""Every captured step beside its eager twin: each kind, stage and bucket, from the same memory, twice in a row.

A replay that holds a number which Python read once, or memory that is another's by now, differs in the second turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.checkpoint import locate
from hnet_runtime.config import ModelConfig
from hnet_runtime.engine.graphs import Eager, StepGraphs
from hnet_runtime.gpu_doctor.checks import Check, Outcome, Settings
from hnet_runtime.gpu_doctor.closeness import close
from hnet_runtime.gpu_doctor.device import Device
from hnet_runtime.gpu_doctor.models import EVERY_KIND, model_on, random_weights, rows_of, weights_of
from hnet_runtime.model.captured import CapturedHNet, StepKey, step_kinds
from hnet_runtime.model.results import StepResult
from hnet_runtime.state.arenas import ModelState, StageState
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

_POSITIONS = 256
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the largest number: products may be arranged otherwise in a graph. As a rule there is no difference at all."""


def checks(device: Device, settings: Settings) -> Iterator[Check]:
    """Of a small random model in both dtypes, and of MODEL in bf16, if there is one."""
    for dtype in TOLERANCE:
        name = f"random, {str(dtype).removeprefix('torch.')}"
        yield from _checks_of(name, _Pair(device, settings, dtype, EVERY_KIND), settings)
    if settings.model is not None:
        yield from _checks_of(settings.model, _Pair(device, settings, torch.bfloat16), settings)


def _checks_of(name: str, pair: _Pair, settings: Settings) -> Iterator[Check]:
    demand = f"the same boundaries, and numbers within {TOLERANCE[pair.dtype]:g} of the largest"
    kinds = step_kinds(len(pair.config.stages))
    sizes = StepGraphs(Eager(), settings.max_graphs).buckets(settings.most_rows, len(kinds))
    yield Check(f"{name}: captured", pair.capture)
    for bucket in reversed(sizes):
        for stage, parks in kinds:
            what = f"{name}: stage {stage}, {'parks' if parks else 'through'}, {bucket} rows"
            yield Check(what, partial(pair.compare, StepKey(bucket, stage, parks)), demand)


class _Pair:
    """A model with captured steps and one with eager ones, over rows in the middle of things; made when first used."""

    def __init__(
        self, device: Device, settings: Settings, dtype: torch.dtype, config: ModelConfig | None = None
    ) -> None:
        self.dtype, self._device, self._settings, self._random = dtype, device, settings, config
        self.config = config or locate(settings.model, settings.config).config

    @cached_property
    def _made(self) -> tuple[tuple[CapturedHNet, ModelState], tuple[CapturedHNet, ModelState]]:
        device = self._device.device
        if self._random is not None:
            weights = random_weights(self._random, self.dtype, device)
        else:
            _, weights = weights_of(self._settings, self.dtype, device)
        graphs = self._settings.max_graphs
        captured = model_on(self._device, self.config, weights, most_graphs=graphs)
        eager = model_on(self._device, self.config, weights, Eager(), graphs)
        one, other = ((model, rows_of(model, self._settings.most_rows, _POSITIONS)) for model in (captured, eager))
        return one, other

    def capture(self) -> Outcome:
        model, state = self._made[0]
        graphs = model.open(state)
        assert isinstance(graphs, StepGraphs)
        said = f"{graphs.num_graphs} steps in {graphs.seconds:.2f} s and {graphs.num_bytes / 2**20:.1f} MiB"
        figures = {"graphs": graphs.num_graphs, "seconds": graphs.seconds, "bytes": graphs.num_bytes}
        return Outcome(graphs.mode == "graph", said, figures)

    def compare(self, key: StepKey) -> Outcome:
        (ours, state), (theirs, twin) = self._made
        ours.open(state)
        theirs.open(twin)
        for each in (state, twin):
            _begin_in_the_middle(each, 17 * key.bucket + 2 * key.stage + key.parks)
        apart = 0.0
        generator = np.random.default_rng(key.bucket)
        # Fewer rows the second time: the same bucket, with padding.
        for count in (key.bucket, key.bucket - (key.bucket > 2)):
            rows = (generator.permutation(self._settings.most_rows)[:count] + 1).tolist()
            data = b"" if key.stage else generator.integers(256, size=count, dtype=np.uint8).tobytes()
            found = ours.step(state, rows, data, stage=key.stage, parks=key.parks)
            expected = theirs.step(twin, rows, data, stage=key.stage, parks=key.parks)
            apart = max(apart, self._results(found, expected), self._memory(state, twin))
        said = "bit for bit" if apart == 0.0 else f"at most {apart:.2g} apart"
        return Outcome(True, said, {"apart": apart})

    def _results(self, found: StepResult, expected: StepResult) -> float:
        if not np.array_equal(found.finished, expected.finished):
            raise AssertionError("other rows come to their end")
        apart = close(found.logits, expected.logits, TOLERANCE[self.dtype])
        for (stage, said), (_, truth) in zip(found.verdicts, expected.verdicts, strict=True):
            if not (np.array_equal(said.rows, truth.rows) and np.array_equal(said.boundary, truth.boundary)):
                raise AssertionError(f"other boundaries at stage {stage}")
            pair = torch.from_numpy(said.p), torch.from_numpy(truth.p)
            apart = max(apart, close(*pair, TOLERANCE[self.dtype]))
        return apart

    def _memory(self, state: ModelState, twin: ModelState) -> float:
        apart = 0.0
        for index, (mine, theirs) in enumerate(zip(state.stages, twin.stages, strict=True)):
            if not np.array_equal(mine.positions, theirs.positions):
                raise AssertionError(f"other positions at stage {index}")
            for one, other in zip(mine.tensors(), theirs.tensors(), strict=True):
                own = _padding_of(mine, one)
                apart = max(apart, close(one[own:], other[own:], TOLERANCE[self.dtype]))
        return apart


def _begin_in_the_middle(state: ModelState, seed: int) -> None:
    """Memory and positions of rows that have read something; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for stage in state.stages:
        count = len(stage.positions)
        stage.positions[1:] = torch.randint(1, _POSITIONS - 4, (count - 1,), generator=generator).numpy()
        for tensor in stage.tensors():
            shift = 0.0 if tensor is stage.parked_p else 0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - shift)


def _padding_of(stage: StageState, tensor: Tensor) -> int:
    """How much of a tensor, from its beginning, is padding's: a row, a page or a ring."""
    if len(tensor) == len(stage.positions):
        return 1
    if isinstance(stage.slots, RingSlots):
        return stage.slots.capacity
    return PAGE if isinstance(stage.slots, PagePool) else 1
