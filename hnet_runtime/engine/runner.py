"""Runs plans on the model: bytes in, logits and verdicts out. Knows tensors and rows; not what a request wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hnet_runtime.engine.messages import Chunk, StepRecord
from hnet_runtime.model.results import Result, Verdicts
from hnet_runtime.state.arenas import ModelState


@dataclass(frozen=True)
class StepResult:
    """One step of B rows: the chunks each row's byte opened, and logits [B, V] fp32."""

    chunks: list[list[Chunk]]
    logits: Tensor
    records: list[StepRecord]


@dataclass(frozen=True)
class PrefillResult:
    """One packed prefill: for each row the chunks its bytes opened, in no order, and logits [t, V] fp32 of the last
    t of its positions, as many as were asked for."""

    chunks: list[list[Chunk]]
    logits: list[Tensor]
    records: list[StepRecord]


class Model(Protocol):
    """What runs rows: `hierarchy.HNet` in torch, or `native.NativeHNet`."""

    def run(
        self, state: ModelState, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]
    ) -> Result: ...


class Runner:
    """A model and the memory of its rows."""

    def __init__(self, model: Model, state: ModelState) -> None:
        self._model, self._state = model, state

    @property
    def state(self) -> ModelState:
        return self._state

    def reset(self, rows: Sequence[int]) -> None:
        self._state.reset(rows)

    def step(self, rows: Sequence[int], data: bytes) -> StepResult:
        """One byte of each row."""
        pieces = [data[index : index + 1] for index in range(len(data))]
        result = self._model.run(self._state, rows, pieces, [1] * len(rows))
        records = [StepRecord("stage" if w.stage else "byte", w.stage, w.positions, w.seconds) for w in result.work]
        return StepResult(_chunks_of(rows, result), result.logits, records)

    def prefill(self, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]) -> PrefillResult:
        """Pieces of prompts, one a row; logits of the last `num_logits` positions of each."""
        result = self._model.run(self._state, rows, pieces, num_logits)
        return PrefillResult(
            chunks=_chunks_of(rows, result),
            logits=list(torch.split(result.logits, list(num_logits))),
            records=[StepRecord("prefill", w.stage, w.positions, w.seconds) for w in result.work],
        )


def _chunks_of(rows: Sequence[int], result: Result) -> list[list[Chunk]]:
    chunks = _chunks_by_row(result.verdicts)
    return [chunks.get(row, []) for row in rows]


def _chunks_by_row(verdicts: tuple[Verdicts, ...]) -> dict[int, list[Chunk]]:
    chunks: dict[int, list[Chunk]] = {}
    for stage, said in enumerate(verdicts, start=1):
        opened = said.boundary.nonzero()[0]
        for row, start, p in zip(
            said.rows[opened].tolist(), said.offsets[opened].tolist(), said.p[opened].tolist(), strict=True
        ):
            chunks.setdefault(row, []).append(Chunk(stage, start, p))
    return chunks
