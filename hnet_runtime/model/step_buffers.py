"""The memory by which the host speaks to a static step and hears of it: its place never changes.

Knows shapes, and which of the host's numbers the device has; not what a step does with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.model.host_memory import pinned
from hnet_runtime.model.step_draws import StepDraws
from hnet_runtime.ops.entry import UNREAD
from hnet_runtime.state.arenas import ModelState
from hnet_runtime.state.rows import PagePool

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Report:
    """What a step has to say, on its way. logits: [bucket, V] a copy: those of the next step take their place."""

    numbers: Tensor
    logits: Tensor
    arrived: torch.cuda.Event | None


class StepBuffers:
    """For steps of up to `most` rows over one state.

    rows, data: [most] int64, a step's rows and their bytes, padded by row 0; positions: of each stage, [rows] int64,
    which steps advance; tables: of each stage that keeps pages, [rows, pages] int64; logits: [most, V] fp32.

    The host's positions and tables (`StageState`) are the truth. What the device has is remembered here, and where the
    two differ (a row that joined, was read, moved or was given a page) `bring` copies the rows that are about to step.
    """

    def __init__(self, state: ModelState, most: int) -> None:
        device = state.device
        self.most, self.device = most, device
        self._stages = state.stages
        num_routed = len(state.stages) - 1
        # Of host memory there are two in turn: a step may be given while the one before is not read.
        self._to_give = [pinned((2, most), np.int64) for _ in range(2)]
        self._turn = 0
        self._given = torch.zeros(2, most, dtype=torch.int64, device=device)
        self.rows, self.data = self._given.unbind(0)
        self.positions = [torch.zeros(state.num_rows, dtype=torch.int64, device=device) for _ in state.stages]
        self.tables: list[Tensor | None] = [
            torch.zeros(stage.slots.table.shape, dtype=torch.int64, device=device)
            if isinstance(stage.slots, PagePool)
            else None
            for stage in state.stages
        ]
        self.logits = torch.zeros(most, VOCAB_SIZE, device=device)
        self.draws = StepDraws(most, state.num_rows, device)
        self._num_reports = num_routed + 2
        self._report = torch.zeros(self._num_reports * most, device=device)
        self._heard = [pinned((self._num_reports * most,), np.float32) for _ in range(2)]
        self._has_cuda = device.type == "cuda" and torch.cuda.is_available()
        self._known_positions = [np.zeros(state.num_rows, dtype=np.int64) for _ in state.stages]
        self._known_tables = [
            np.zeros_like(stage.slots.table) if isinstance(stage.slots, PagePool) else None for stage in state.stages
        ]

    # ── what a step reads and writes ──────────────────────────────────────────────────────────────

    def verdicts(self, stage: int, bucket: int) -> Tensor:
        """[bucket] where p of a routed stage goes."""
        return self._report_rows(self._report, bucket)[stage]

    def ran(self, bucket: int) -> Tensor:
        """[bucket] where it is said which of a step's rows ran: 1, or 0."""
        return self._report_rows(self._report, bucket)[-2]

    def drawn(self, bucket: int) -> Tensor:
        """[bucket] where the next bytes of the rows that came to their end go, in order."""
        return self._report_rows(self._report, bucket)[-1]

    def _report_rows(self, report: Tensor, bucket: int) -> Tensor:
        return report[: self._num_reports * bucket].view(self._num_reports, bucket)

    def tensors(self) -> list[Tensor]:
        """All that a step may write besides the state, and that must outlive it."""
        return [self._given, *self.positions, *self._page_tables(), self.logits, self._report, *self.draws.tensors()]

    def _page_tables(self) -> Iterator[Tensor]:
        return (table for table in self.tables if table is not None)

    # ── the host's side ───────────────────────────────────────────────────────────────────────────

    def bring(self, rows: Ints, data: bytes, bucket: int, unread: NDArray[np.bool_] | None = None) -> None:
        """Gives the device a step's rows, their bytes if it has any, and what it does not know about them. Those that
        are `unread` [B] go on with the byte that they drew last."""
        self._turn = 1 - self._turn
        given = self._to_give[self._turn].numpy()
        given[0, : len(rows)] = rows
        given[0, len(rows) : bucket] = 0
        if data:
            given[1, : len(rows)] = np.frombuffer(data, dtype=np.uint8)
            given[1, len(rows) : bucket] = 0
        if unread is not None:
            given[1, : len(rows)][unread] = UNREAD
        self._given.copy_(self._to_give[self._turn], non_blocking=True)
        self.draws.send()
        for index, stage in enumerate(self._stages):
            known = self._known_positions[index]
            stale = rows[known[rows] != stage.positions[rows]]
            if len(stale):
                _scatter(self.positions[index], stale, stage.positions[stale])
                known[stale] = stage.positions[stale]
            table, pages = self.tables[index], self._known_tables[index]
            if table is not None and pages is not None and isinstance(stage.slots, PagePool):
                stale = rows[(pages[rows] != stage.slots.table[rows]).any(1)]
                if len(stale):
                    _scatter(table, stale, stage.slots.table[stale])
                    pages[stale] = stage.slots.table[stale]

    def advanced(self, stage: int, rows: Ints) -> None:
        """A step has counted a position of these rows, on the device and by this on the host."""
        self._stages[stage].positions[rows] += 1
        self._known_positions[stage][rows] += 1

    def ask(self, bucket: int) -> Report:
        """Begins the one copy of what a step has to say."""
        size = self._num_reports * bucket
        heard = self._heard[self._turn]
        heard[:size].copy_(self._report[:size], non_blocking=True)
        logits = self.logits[:bucket].clone()
        arrived = torch.cuda.Event() if self._has_cuda else None  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record()
        return Report(self._report_rows(heard, bucket), logits, arrived)

    @staticmethod
    def hear(report: Report) -> NDArray[np.float32]:
        """Waits for it: [routed stages + 2, bucket], p of each stage in the order of its batch, who ran, and the bytes
        drawn."""
        if report.arrived is not None:
            report.arrived.synchronize()
        heard: NDArray[np.float32] = report.numbers.numpy().copy()
        return heard


def _scatter(target: Tensor, rows: Ints, values: Ints) -> None:
    places, given = (torch.from_numpy(each).to(target.device, non_blocking=True) for each in (rows, values))
    target.index_copy_(0, places, given)
