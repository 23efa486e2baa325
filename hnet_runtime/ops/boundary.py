"""What the router's verdict does with a step's rows: those that open a chunk go a stage further, or wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.compaction import compact
from hnet_runtime.ops.router import BOUNDARY_THRESHOLD


def descend_step(
    p: Tensor, rows: Tensor, encoded: Tensor, pad: Tensor | None, report: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The next stage's batch: rows that open a chunk first, in order; then padding as often as it takes.

    p: [B] fp32, rows: [B] int64, encoded: [B, D] in the model's dtype, pad: [W − D] in it, what widens a vector to the
    next stage's, or None, report: [B] fp32 (takes p) → h: [B, W], past the opening rows the first of the batch;
    inner_rows: [B] int64 their arena rows, past them 0, the padding row; opened: [B] bool; chunk: [B] int64 where
    each row stands in the next stage's batch, 0 where it opens none; wide: encoded in fp32.
    """
    report.copy_(p)
    opened = (p > BOUNDARY_THRESHOLD) & (rows > 0)
    places, inner_rows, chunk, _ = compact(opened, rows)
    return widened(encoded.index_select(0, places), pad), inner_rows, opened, chunk, encoded.float()


def park_step(
    p: Tensor, rows: Tensor, encoded: Tensor, parked: Tensor, parked_p: Tensor, report: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps what rows that open a chunk wait with; the others come first in what is left of the batch.

    p: [B] fp32, rows: [B] int64, encoded: [B, D] in the model's dtype, parked: [rows, D] in it and parked_p: [rows]
    fp32 (updated in place), report: [B] fp32 (takes p) → wide: [B, D] fp32 of the rows that go on, past them the first
    of the batch; ended: [B] int64 their arena rows, past them 0; places: [B] int64 where they stood, past them 0.
    """
    report.copy_(p)
    opens = p > BOUNDARY_THRESHOLD
    waiting = torch.where(opens, rows, 0)  # for those that go on, padding's memory takes what is written
    parked.index_copy_(0, waiting, encoded)
    parked_p.index_copy_(0, waiting, p)
    places, ended, _, _ = compact(~opens & (rows > 0), rows)
    return encoded.index_select(0, places).float(), ended, places


def widened(h: Tensor, pad: Tensor | None) -> Tensor:
    """h: [B, D], pad: [W − D] or None → [B, W]."""
    return h if pad is None else torch.cat((h, pad.expand(h.shape[0], -1)), -1)
