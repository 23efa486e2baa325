"""Static steps of real models as subjects of the proofs, and random courses of rows through them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig, tensor_shapes
from hnet_runtime.engine.graphs import Captures, Eager, StepGraphs
from hnet_runtime.engine.runner import Model
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.step_buffers import StepBuffers
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.state.arenas import AttentionState, LayerState, Mamba2State, ModelState, StageState
from hnet_runtime.state.rows import PAGE, RingSlots

TEXT = b"\xfeIt was a bright cold day in April, and 13 clocks were striking. \xc3\xa9\xff zzzzzzzz"
ROWS, POSITIONS = 6, 128


def captured(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    captures: Captures | None = None,
    ops: StepOps | None = None,
    override: RouterOverride | None = None,
    **graphs: int,
) -> CapturedHNet:
    return CapturedHNet(config, weights, lambda: StepGraphs(captures or Eager(), **graphs), ops, override)


def new_rows(model: Any, count: int = ROWS) -> ModelState:
    state = model.new_state(num_rows=count, kv_positions=count * POSITIONS, max_positions=POSITIONS)
    for pool in state.page_pools:
        for row in range(1, count + 1):
            pool.reserve(row, POSITIONS)
    return state


def named_tensors(state: ModelState, buffers: StepBuffers) -> dict[str, Tensor]:
    """All that outlives a step, by names that say stage and stack."""
    named: dict[str, Tensor] = {}
    for index, stage in enumerate(state.stages):
        for stack, layers in stage.stacks.items():
            for number, layer in enumerate(layers):
                place = f"{index}.{stack}.{number}"
                match layer:
                    case Mamba2State(conv, ssm):
                        named |= {f"{place}.conv": conv, f"{place}.ssm": ssm}
                    case AttentionState(k, v):
                        named |= {f"{place}.k": k, f"{place}.v": v}
        for name in ("router", "ema", "parked", "parked_p"):
            tensor = getattr(stage, name)
            if tensor is not None:
                named[f"{index}.{name}"] = tensor
        named[f"{index}.positions"] = buffers.positions[index]
    return named


def padding_of(stage: StageState, tensor: Tensor) -> int:
    """How much of a tensor of a stage's state, from its beginning, is padding's."""
    if all(tensor is not kept for layers in stage.stacks.values() for each in layers for kept in _kept(each)):
        return 1
    return stage.slots.capacity if isinstance(stage.slots, RingSlots) else PAGE


def _kept(layer: LayerState) -> tuple[Tensor, ...]:
    return (layer.k, layer.v) if isinstance(layer, AttentionState) else ()


def declared_state(state: ModelState, names: Sequence[str], stage: int, parks: bool) -> list[str]:
    """What a step at a stage is to write, from what the step is: nothing of stages below but their decoders and
    averages, nothing of stages above a boundary at which rows wait."""
    last = stage if parks else len(state.stages) - 1
    wanted = []
    for name in names:
        index, kind = int(name.split(".")[0]), name.split(".")[1]
        if index < stage:
            written = kind in ("decoder", "ema")
        elif index > last:
            written = False
        elif kind in ("parked", "parked_p"):
            written = parks
        elif kind == "ema":
            written = not parks
        else:
            written = True
        wanted += [name] if written else []
    return wanted


def assert_memory_is_the_same(one: ModelState, other: ModelState) -> None:
    """Of all rows; row 0 and page 0 are nobody's."""
    for index, (mine, theirs) in enumerate(zip(one.stages, other.stages, strict=True)):
        assert np.array_equal(mine.positions, theirs.positions)
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            own = padding_of(mine, a)
            assert torch.equal(a[own:], b[own:]), f"stage {index}"


def step_together(model: Model, twin: Model, seed: int, parks: Callable[[random.Random], bool], rows: int = 5) -> None:
    """Rows in random company through both; every result and the memory after it must be the same."""
    rng = random.Random(seed)
    ours, theirs = new_rows(model), new_rows(twin)
    texts = {row: TEXT[:1] + TEXT[row:][: 8 + 3 * row] for row in range(1, rows + 1)}
    for state, each in ((ours, model), (theirs, twin)):  # some have read something before
        each.run(state, [1, 3], [texts[1][:5], texts[3][:9]], [0, 0])
    fed = {row: {1: 5, 3: 9}.get(row, 0) for row in texts}
    due = dict.fromkeys(texts, 0)
    turn = 0
    while left := [row for row in texts if fed[row] < len(texts[row]) or due[row]]:
        stage = due[rng.choice(left)]
        lane = [row for row in left if due[row] == stage]
        chosen = rng.sample(lane, rng.randrange(1, len(lane) + 1))
        data = b"" if stage else bytes(texts[row][fed[row]] for row in chosen)
        waits = parks(rng)
        found = model.step(ours, chosen, data, stage=stage, parks=waits)
        expected = twin.step(theirs, chosen, data, stage=stage, parks=waits)
        assert np.array_equal(found.finished, expected.finished)
        assert torch.equal(found.logits, expected.logits)
        for (index, said), (truth_index, truth) in zip(found.verdicts, expected.verdicts, strict=True):
            assert index == truth_index
            for name in ("rows", "offsets", "p", "boundary"):
                assert np.array_equal(getattr(said, name), getattr(truth, name)), (index, name)
        positions = {work.stage: work.positions for work in found.work if work.positions}
        assert positions == {work.stage: work.positions for work in expected.work if work.positions}
        for row, done in zip(chosen, found.finished, strict=True):
            fed[row] += stage == 0
            due[row] = 0 if done else stage + 1
        turn += 1
        if turn % 8 == 0:
            assert_memory_is_the_same(ours, theirs)
    assert_memory_is_the_same(ours, theirs)


class StepSubject:
    """One kind of step on rows in the middle of things, drawn at random: a subject of `proofs`."""

    def __init__(self, model: CapturedHNet, stage: int, parks: bool, rows: int = ROWS) -> None:
        self._stage, self._parks = stage, parks
        self.arenas = new_rows(model, rows)
        self.num_rows = self.arenas.num_rows
        self._buffers = StepBuffers(self.arenas, rows)
        self._step = model.static_step(self.arenas, self._buffers)
        self.state = named_tensors(self.arenas, self._buffers)
        self.constants = model.constants()
        own = {id(tensor) for tensor in self._buffers.positions}
        self.scratch = [tensor for tensor in self._buffers.tensors() if id(tensor) not in own]
        if model.device.type == "cpu":
            self._begin_in_the_middle()

    def _begin_in_the_middle(self) -> None:
        generator = torch.Generator().manual_seed(7)
        for stage in self.arenas.stages:
            stage.positions[1:] = torch.randint(1, 30, (len(stage.positions) - 1,), generator=generator).numpy()
        for name, tensor in self.state.items():
            if not name.endswith("positions"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.0 if name.endswith("_p") else 0.5))
        self._buffers.bring(np.arange(1, self.arenas.num_rows), b"", 1)

    def fill(self, turn: int, bucket: int) -> None:
        rows = self.rows_of(turn)
        data = bytes((37 * turn + row) % 256 for row in rows)
        self._buffers.bring(np.array(rows), b"" if self._stage else data, bucket)

    def run(self, bucket: int) -> None:
        self._step.run(bucket, self._stage, self._parks)

    def read(self, turn: int) -> Mapping[str, Tensor]:
        count = len(self.rows_of(turn))
        return {"logits": self._buffers.logits[: count if not self._parks else 0].clone()}

    def rows_of(self, turn: int) -> tuple[int, ...]:
        return ((3, 1, 5), (1, 5), (5, 3, 4, 2), (6,))[turn % 4]


def fake_weights(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights without memory, on CUDA; under fake tensors alone."""
    kept = (".mixer.D", ".residual_proj.weight", ".residual_proj.bias")
    return {
        key: torch.zeros(shape, dtype=torch.float32 if key.endswith(kept) else dtype, device="cuda")
        for key, shape in tensor_shapes(config).items()
    }


def fake_model(config: ModelConfig, dtype: torch.dtype, ops: StepOps | None = None) -> CapturedHNet:
    """A model of such weights."""
    return CapturedHNet(config, fake_weights(config, dtype), lambda: StepGraphs(Eager()), ops)


def shortened(config: ModelConfig) -> ModelConfig:
    """The same with at most two layers of a kind in a row: what more of them call is the same again."""

    def short(layout: Any) -> Any:
        if isinstance(layout, str):
            return re.sub("[0-9]+", lambda number: str(min(int(number[0]), 2)), layout)
        return [short(each) for each in layout]

    return ModelConfig.from_dict({**config.source, "arch_layout": short(config.source["arch_layout"])})
