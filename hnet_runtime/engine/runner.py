"""Runs plans on the model: bytes in, logits and verdicts out. Knows tensors and rows; not what a request wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hnet_runtime.engine.graphs import StepGraphs
from hnet_runtime.engine.messages import Chunk, GraphReplays, StepRecord
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.results import Result, StageWork, StepResult, Verdicts
from hnet_runtime.state.arenas import ModelState


@dataclass(frozen=True)
class Routed:
    """What the router of one stage said in one piece of work."""

    stage: int
    positions: int
    boundaries: int


@dataclass(frozen=True)
class Stepped:
    """One position of B rows. finished: [B] whose byte came to its end, the others are parked; chunks: what each row's
    position opened; logits: [finished ones, V] fp32; work: of each stage with positions, its own stacks' alone."""

    finished: list[bool]
    chunks: list[list[Chunk]]
    logits: Tensor
    records: list[StepRecord]
    work: list[StageWork]
    routed: list[Routed]


@dataclass(frozen=True)
class PrefillResult:
    """One packed prefill: for each row the chunks its bytes opened, in no order, and logits [t, V] fp32 of the last
    t of its positions, as many as were asked for."""

    chunks: list[list[Chunk]]
    logits: list[Tensor]
    records: list[StepRecord]
    work: list[StageWork]


Landing = Callable[[], tuple[list[bool], Stepped]]
"""Waits for a step; see `Runner.launch`."""


class Model(Protocol):
    """What runs rows: `hierarchy.HNet` in torch, `captured.CapturedHNet` on a GPU, or `native.NativeHNet`."""

    def run(
        self, state: ModelState, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]
    ) -> Result: ...

    def step(
        self, state: ModelState, rows: Sequence[int], data: bytes, *, stage: int = 0, parks: bool = True
    ) -> StepResult: ...


class Runner:
    """A model and the memory of its rows. graphs: what replays its steps, where something does."""

    def __init__(self, model: Model, state: ModelState, graphs: StepGraphs | None = None) -> None:
        self._model, self._state, self._graphs = model, state, graphs

    @property
    def state(self) -> ModelState:
        return self._state

    def launch(
        self,
        rows: Sequence[int],
        data: bytes,
        *,
        stage: int = 0,
        through: bool = True,
        unread: Sequence[bool] | None = None,
    ) -> Landing:
        """One position of each row at `stage`: its next byte where that is 0, else what it was parked with.

        What it gives, once, is which of the rows ran and what came of those who did. Where steps are static the device
        is busy with it until then, and may have been given one step more: one whose `unread` rows go on with the byte
        that this one draws for them, if it draws one at which they do not pause.
        """
        model = self._model
        if not isinstance(model, CapturedHNet):
            stepped = self._stepped(rows, stage, model.step(self._state, rows, data, stage=stage, parks=not through))
            return lambda: ([True] * len(rows), stepped)
        flight = model.launch(self._state, rows, data, stage=stage, parks=not through, unread=unread)

        def land() -> tuple[list[bool], Stepped]:
            result = flight.land()
            assert flight.ran is not None
            return flight.ran.tolist(), self._stepped(flight.rows[flight.ran].tolist(), stage, result)

        return land

    def _stepped(self, rows: Sequence[int], stage: int, result: StepResult) -> Stepped:
        work = [each for each in result.work if each.positions]
        # Decoders below a stage that fired finish its rows' bytes: their time is a part of its step.
        surfacing = sum(each.seconds for each in result.work if not each.positions)
        records = [
            StepRecord(
                "stage" if each.stage else "byte",
                each.stage,
                each.positions,
                each.seconds + (surfacing if each.stage == stage else 0.0),
            )
            for each in work
        ]
        routed = [Routed(index, len(said.boundary), int(said.boundary.sum())) for index, said in result.verdicts]
        return Stepped(
            result.finished.tolist(), _chunks_of(rows, result.verdicts), result.logits, records, work, routed
        )

    def prefill(self, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]) -> PrefillResult:
        """Pieces of prompts, one a row; logits of the last `num_logits` positions of each."""
        result = self._model.run(self._state, rows, pieces, num_logits)
        return PrefillResult(
            chunks=_chunks_of(rows, enumerate(result.verdicts)),
            logits=list(torch.split(result.logits, list(num_logits))),
            records=[StepRecord("prefill", each.stage, each.positions, each.seconds) for each in result.work],
            work=list(result.work),
        )

    def take_replays(self) -> tuple[GraphReplays, ...]:
        """Of static steps, since the last call."""
        return self._graphs.take() if self._graphs is not None else ()

    def num_fed(self, row: int) -> int:
        """Bytes that a row has run."""
        return int(self._state.stages[0].positions[row])


def _chunks_of(rows: Sequence[int], verdicts: Iterable[tuple[int, Verdicts]]) -> list[list[Chunk]]:
    """Of each row, the chunks of the stages above that its positions opened."""
    chunks: dict[int, list[Chunk]] = {}
    for stage, said in verdicts:
        opened = said.boundary.nonzero()[0]
        for row, start, p in zip(
            said.rows[opened].tolist(), said.offsets[opened].tolist(), said.p[opened].tolist(), strict=True
        ):
            chunks.setdefault(row, []).append(Chunk(stage + 1, start, p))
    return [chunks.get(row, []) for row in rows]
