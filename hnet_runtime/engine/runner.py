"""Runs plans on the model: bytes in, logits and verdicts out. Knows tensors and rows; not what a request wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hnet_runtime.engine.messages import Chunk, StepRecord
from hnet_runtime.model.hierarchy import Forward, HNet, Verdicts
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


class Runner:
    """A model and the memory of its rows."""

    def __init__(self, model: HNet, state: ModelState) -> None:
        self._model, self._state = model, state

    @property
    def state(self) -> ModelState:
        return self._state

    def reset(self, rows: Sequence[int]) -> None:
        self._state.reset(rows)

    def step(self, rows: Sequence[int], data: bytes) -> StepResult:
        """One byte of each row."""
        forward = self._model.forward(self._state, list(rows), [data[i : i + 1] for i in range(len(data))])
        chunks = _chunks_by_row(forward.verdicts)
        records = [StepRecord("stage" if w.stage else "byte", w.stage, w.positions, w.seconds) for w in forward.work]
        return StepResult([chunks.get(row, []) for row in rows], self._model.logits(forward.hidden), records)

    def prefill(self, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]) -> PrefillResult:
        """Pieces of prompts, one a row; logits of the last `num_logits` positions of each."""
        forward = self._model.forward(self._state, list(rows), list(pieces))
        chunks = _chunks_by_row(forward.verdicts)
        return PrefillResult(
            chunks=[chunks.get(row, []) for row in rows],
            logits=[self._last_logits(forward, index, count) for index, count in enumerate(num_logits)],
            records=[StepRecord("prefill", w.stage, w.positions, w.seconds) for w in forward.work],
        )

    def _last_logits(self, forward: Forward, index: int, count: int) -> Tensor:
        places = forward.places(index)
        return self._model.logits(forward.hidden[places[len(places) - count :]])


def _chunks_by_row(verdicts: tuple[Verdicts, ...]) -> dict[int, list[Chunk]]:
    chunks: dict[int, list[Chunk]] = {}
    for stage, said in enumerate(verdicts, start=1):
        opened = said.boundary.nonzero()[0]
        for row, start, p in zip(
            said.rows[opened].tolist(), said.offsets[opened].tolist(), said.p[opened].tolist(), strict=True
        ):
            chunks.setdefault(row, []).append(Chunk(stage, start, p))
    return chunks
