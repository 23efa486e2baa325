"""Gathering the rows that go on, with shapes that do not depend on how many they are."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(chosen: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chosen rows first, in order; then the padding row as often as it takes.

    chosen: [B] bool, rows: [B] int64 → places [B]: where the chosen ones stand, past them 0; inner_rows [B]: their
    arena rows, past them 0, the padding row; slot [B]: where each row stands among the chosen, 0 if it is none of
    them; count [1]: how many they are. All int64 and on the device: `count` is not read to know a shape.
    """
    length = chosen.shape[0]
    running = torch.cumsum(chosen, 0)  # [B] how many are chosen up to here
    slot = torch.where(chosen, running - 1, 0)
    # Those not chosen are written to one place too many, which is cut off.
    target = torch.where(chosen, slot, length)
    here = torch.arange(length, device=chosen.device)
    places, inner_rows = torch.zeros(2, length + 1, dtype=torch.int64, device=chosen.device).unbind(0)
    places.scatter_(0, target, here)
    inner_rows.scatter_(0, target, rows)
    return places[:length], inner_rows[:length], slot, running[-1:]
