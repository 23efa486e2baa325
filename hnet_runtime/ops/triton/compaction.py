"""Gathering the rows that go on: one program over all rows of a step."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.triton.launching import contiguous, launch, operation, power_of_two

MOST_ROWS = 4096
"""Rows that one program takes."""


@triton.jit
def _compact(chosen, rows, places, inner_rows, slot, count, length, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)
    inside = here < length
    is_chosen = tl.load(chosen + here, inside, other=0).to(tl.int32)
    row = tl.load(rows + here, inside, other=0)
    rank = tl.cumsum(is_chosen, 0) - 1
    number = tl.sum(is_chosen, 0)
    tl.store(slot + here, tl.where(is_chosen != 0, rank, 0).to(tl.int64), inside)
    # Every place is written once: the first `number` by the chosen ones, the others by the program's own lanes.
    tl.store(places + rank, here.to(tl.int64), is_chosen != 0)
    tl.store(inner_rows + rank, row, is_chosen != 0)
    past = inside & (here >= number)
    tl.store(places + here, tl.zeros([BLOCK], tl.int64), past)
    tl.store(inner_rows + here, tl.zeros([BLOCK], tl.int64), past)
    tl.store(count, number.to(tl.int64))


def _empty(chosen: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    places, inner_rows, slot = (torch.empty_like(rows) for _ in range(3))
    return places, inner_rows, slot, torch.empty(1, dtype=torch.int64, device=rows.device)


@operation(fake=_empty)
def compact(chosen: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.compaction`); ValueError for more than 4096 rows."""
    contiguous(chosen, rows)
    length = len(rows)
    if length > MOST_ROWS:
        raise ValueError(f"{length} rows; one program takes {MOST_ROWS}")
    outputs = _empty(chosen, rows)
    block = power_of_two(length)
    launch(_compact, (1,), chosen, rows, *outputs, length, BLOCK=block, num_warps=min(max(block // 64, 1), 8))
    return outputs
