"""Where rows are at a stage: the position that they run, and where attention keeps its key."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.attention import key_slots


def next_places(rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The rows' next position, which is counted; but never one of padding.

    rows: [B] int64, positions: [rows] int64 how many each has run (updated in place), table, capacity: as in
    `key_slots`, both None where nothing is kept → at: [B] int64; slots: [B] int64, 0 where nothing is kept.
    """
    at = positions.index_select(0, rows)
    positions.index_copy_(0, rows, at + (rows > 0))
    return at, _slots(rows, at, table, capacity)


def last_places(rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The same of the position that the rows ran last, which is counted already; padding stays at 0."""
    at = (positions.index_select(0, rows) - 1).clamp(min=0)
    return at, _slots(rows, at, table, capacity)


def _slots(rows: Tensor, at: Tensor, table: Tensor | None, capacity: int | None) -> Tensor:
    if table is None and capacity is None:
        return torch.zeros_like(rows)
    return key_slots(rows, at.unsqueeze(-1), table, capacity).squeeze(-1)
