"""Where rows are at a stage: one lane a row."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.attention import BLOCK as PAGE
from hnet_runtime.ops.triton.launching import blocks, contiguous, launch, operation, power_of_two

BLOCK, WARPS = 128, 1
"""Rows of one program."""


@triton.jit
def _places(
    rows,
    positions,
    table,
    at,
    slots,
    length,
    table_stride,
    COUNTS: tl.constexpr,
    PAGED: tl.constexpr,
    CAPACITY: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < length
    row = tl.load(rows + here, inside, other=0)
    now = tl.load(positions + row, inside, other=0)
    if COUNTS:
        tl.store(positions + row, now + 1, inside & (row > 0))
    else:
        now = tl.maximum(now - 1, 0)
    slot = tl.zeros([BLOCK], tl.int64)
    if CAPACITY > 0:
        slot = row * CAPACITY + now % CAPACITY
    if PAGED:
        page = tl.load(table + row * table_stride + now // PAGE, inside, other=0)
        slot = page * PAGE + now % PAGE
    tl.store(at + here, now, inside)
    tl.store(slots + here, slot, inside)


def _empty(rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(rows)


def _find(
    counts: bool, rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor]:
    contiguous(rows, positions, *(() if table is None else (table,)))
    at, slots = _empty(rows, positions, table, capacity)
    length = len(rows)
    block = min(BLOCK, power_of_two(length))
    launch(
        _places,
        (blocks(length, block),),
        rows,
        positions,
        rows if table is None else table,
        at,
        slots,
        length,
        0 if table is None else table.stride(0),
        COUNTS=counts,
        PAGED=table is not None,
        CAPACITY=capacity or 0,
        PAGE=PAGE,
        BLOCK=block,
        num_warps=WARPS,
    )
    return at, slots


@operation(fake=_empty, mutates=("positions",))
def next_places(rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.places`)."""
    return _find(True, rows, positions, table, capacity)


@operation(fake=_empty)
def last_places(rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.places`)."""
    return _find(False, rows, positions, table, capacity)
