"""An H-Net whose steps are graphs: `run` is `hierarchy.HNet`'s, `step` fills buffers, replays, and reads what came.

Knows buckets and what a step says; not how a step is captured or replayed (`engine.graphs`), nor requests.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.results import StageWork, StepResult, Verdicts
from hnet_runtime.model.static_step import StaticStep
from hnet_runtime.model.step_buffers import Report, StepBuffers
from hnet_runtime.model.step_draws import StepDraws
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.router import BOUNDARY_THRESHOLD
from hnet_runtime.state.arenas import ModelState


@dataclass(frozen=True, order=True)
class StepKey:
    """Which static step: of so many rows, padding included, at a stage; `parks` says that rows which open a chunk
    there wait."""

    bucket: int
    stage: int
    parks: bool


class Replays(Protocol):
    """Holds steps in the form in which they run fastest."""

    def buckets(self, most: int, kinds: int) -> Sequence[int]:
        """Numbers of rows, rising, the last of them `most`, that steps of so many kinds are held for."""

    def prepare(
        self, steps: Mapping[StepKey, Callable[[], None]], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """Takes all steps over one state; constants are read, state is read and written. Now their rows are padding
        alone, so that a step may be run to try it."""

    def run(self, key: StepKey) -> None:
        """One of them, in order with what else the device is given."""


class CapturedHNet(HNet):
    """The runtime's model with static steps. Of ModelStates, each has buffers and steps of its own."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        make_replays: Callable[[], Replays],
        ops: StepOps | None = None,
        override: RouterOverride | None = None,
    ) -> None:
        super().__init__(config, weights, override)
        self._make_replays = make_replays
        self.ops = ops or StepOps.torch()
        self._sessions: weakref.WeakKeyDictionary[ModelState, _Session] = weakref.WeakKeyDictionary()

    def open(self, state: ModelState) -> Replays:
        """Captures the steps over a state, if they are not yet."""
        session = self._sessions.get(state)
        if session is None:
            session = self._sessions[state] = _Session(self, state, self._make_replays())
        return session.replays

    def draws(self, state: ModelState) -> StepDraws:
        """By what the rows of the next step over a state draw their bytes."""
        self.open(state)
        return self._sessions[state].draws

    def step(
        self, state: ModelState, rows: Sequence[int], data: bytes, *, stage: int = 0, parks: bool = True
    ) -> StepResult:
        """One position of each row at `stage`; see hierarchy.HNet.step."""
        return self.launch(state, rows, data, stage=stage, parks=parks).land()

    @torch.no_grad()
    def launch(
        self,
        state: ModelState,
        rows: Sequence[int],
        data: bytes,
        *,
        stage: int = 0,
        parks: bool = True,
        unread: Sequence[bool] | None = None,
    ) -> Flight:
        """A step that the device is given and nobody has read. One more may be launched before it lands, at stage 0:
        its rows that are `unread` go on with the byte that this one draws for them, whatever `data` says, or are left
        out where this one draws none or one at which they pause."""
        self.open(state)
        chosen = None if unread is None else np.asarray(unread, dtype=np.bool_)
        return self._sessions[state].launch(np.asarray(rows, dtype=np.int64), data, stage, parks, chosen)

    def static_step(self, state: ModelState, buffers: StepBuffers) -> StaticStep:
        """The step as a function of memory, over a state and buffers."""
        return StaticStep(self._stages, self.embeddings, self.head, state, buffers, self.ops, self._override)

    def constants(self) -> list[Tensor]:
        """All weights that a step reads."""
        return [self.embeddings, self.head, *_tensors_in(self._stages)]


def step_kinds(num_stages: int) -> list[tuple[int, bool]]:
    """(stage, parks) of every step there is: at the last stage nobody can wait."""
    return [
        (stage, parks) for stage in range(num_stages) for parks in (False, True) if stage < num_stages - 1 or not parks
    ]


@dataclass
class Flight:
    """A step between its launch and its landing. ran: which of its rows ran, once it has landed."""

    session: _Session
    rows: NDArray[np.int64]
    stage: int
    parks: bool
    report: Report
    began: float
    ran: NDArray[np.bool_] | None = None

    @torch.no_grad()
    def land(self) -> StepResult:
        """Waits for it: what came of the rows that ran."""
        self.ran, result = self.session.land(self)
        return result


class _Session:
    """Steps over one state."""

    def __init__(self, model: CapturedHNet, state: ModelState, replays: Replays) -> None:
        self._stages = state.stages  # and not the state, on which the session hangs
        self._num_stages = len(state.stages)
        self._parameters = model.config.parameters_per_stage
        most = state.num_rows - 1
        self._buffers = StepBuffers(state, most)
        self.draws = self._buffers.draws
        self._landed = 0.0  # when a flight did last
        self.replays = replays
        kinds = step_kinds(self._num_stages)
        self._buckets = np.array(replays.buckets(most, len(kinds)))
        step = model.static_step(state, self._buffers)
        keys = [StepKey(int(bucket), stage, parks) for bucket in self._buckets[::-1] for stage, parks in kinds]
        memory = [*(tensor for stage in state.stages for tensor in stage.tensors()), *self._buffers.tensors()]
        replays.prepare({key: _bound(step, key) for key in keys}, model.constants(), memory)

    def launch(
        self, rows: NDArray[np.int64], data: bytes, stage: int, parks: bool, unread: NDArray[np.bool_] | None
    ) -> Flight:
        began = time.perf_counter()
        bucket = int(self._buckets[np.searchsorted(self._buckets, len(rows))])
        parks = parks and stage < self._num_stages - 1
        self._buffers.bring(rows, data, bucket, unread)
        self.replays.run(StepKey(bucket, stage, parks))
        return Flight(self, rows, stage, parks, self._buffers.ask(bucket), began)

    def land(self, flight: Flight) -> tuple[NDArray[np.bool_], StepResult]:
        """Who ran, of the rows of a flight, and what came of those who did. Flights land in the order of launching."""
        heard = self._buffers.hear(flight.report)
        stage, parks = flight.stage, flight.parks
        ran = heard[-2, : len(flight.rows)] > 0
        rows = flight.rows[ran]
        p = heard[stage, : len(flight.rows)][ran] if stage < self._num_stages - 1 else None
        offsets = self._stages[0].positions[rows] - (1 if stage else 0)
        finished = np.ones(len(rows), dtype=np.bool_)
        verdicts: list[tuple[int, Verdicts]] = []
        positions = [0] * self._num_stages
        here = rows
        for index in range(stage, self._num_stages):
            positions[index] = len(here)
            self._buffers.advanced(index, here)
            if p is None or not len(here):
                break
            boundary = p > BOUNDARY_THRESHOLD
            verdicts.append((index, Verdicts(here, offsets, p, boundary)))
            if parks:
                finished = ~boundary
                break
            here, offsets = here[boundary], offsets[boundary]
            p = heard[index + 1, : len(here)] if index + 1 < self._num_stages - 1 else None
        ended = np.flatnonzero(ran)[finished]  # places in the batch
        # A step that parks puts those who ended first, one that does not leaves each where it is.
        given = np.arange(len(ended)) if parks else ended
        self.draws.drawn = dict(zip(ended.tolist(), heard[-1, given].astype(np.int64).tolist(), strict=True))
        logits = _rows_of(flight.report.logits, given)
        deepest = stage if parks else self._num_stages - 1
        now = time.perf_counter()
        seconds = now - max(flight.began, self._landed)
        self._landed = now
        return ran, StepResult(finished, logits, tuple(verdicts), self._work(positions, deepest, seconds))

    def _work(self, positions: Sequence[int], deepest: int, seconds: float) -> tuple[StageWork, ...]:
        """The time of a step shared among its stages by their weights: reading those is what decoding does, and nothing
        looks at a clock inside a graph."""
        shares = np.array(self._parameters[: deepest + 1], dtype=np.float64)
        shares *= seconds / shares.sum()
        return tuple(StageWork(index, positions[index], float(share)) for index, share in enumerate(shares))


def _rows_of(logits: Tensor, places: NDArray[np.int64]) -> Tensor:
    """Those rows of [B, V], without a wait for what the device has under way."""
    count = len(places)
    if not count or places[-1] == count - 1:  # they rise
        return logits[:count]
    return logits.index_select(0, torch.from_numpy(places).to(logits.device, non_blocking=True))


def _bound(step: StaticStep, key: StepKey) -> Callable[[], None]:
    return lambda: step.run(key.bucket, key.stage, key.parks)


def _tensors_in(thing: Any) -> Iterator[Tensor]:
    """Tensors of weights, wherever they hang."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list):
        for each in thing:
            yield from _tensors_in(each)
    elif type(thing).__module__.startswith("hnet_runtime.model."):
        for each in vars(thing).values():
            yield from _tensors_in(each)
