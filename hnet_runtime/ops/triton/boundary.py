"""What the router's verdict does with a step's rows: a program a row, each of which ranks all of them for itself.

That is cheaper than a launch more, which would be the only way for programs to wait for each other.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.router import BOUNDARY_THRESHOLD
from hnet_runtime.ops.triton.launching import contiguous, launch, operation, power_of_two
from hnet_runtime.ops.triton.norm import warps_of

MOST_ROWS = 4096
"""Rows that one program ranks."""


@triton.jit
def _ranked(chosen, row, here, place):
    """Of the row that is number `place` among the chosen ones: where it stands, and its arena row; 0 and 0 if there is
    none. Then the number of the row that stands at `place`, 0 if it is not chosen."""
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    wanted = chosen & (rank == place)
    source = tl.sum(tl.where(wanted, here, 0), 0)
    inner = tl.sum(tl.where(wanted, row, 0), 0)
    own = tl.sum(tl.where(chosen & (here == place), rank, 0), 0)
    return source.to(tl.int64), inner, own.to(tl.int64)


@triton.jit
def widen(source, pad, out, channel, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr):
    """A vector of WIDTH numbers copied, and behind it the pad."""
    taken = tl.load(source + channel, channel < WIDTH, other=0.0)
    if OUT_WIDTH > WIDTH:
        behind = channel >= WIDTH
        padding = tl.load(pad + channel - WIDTH, behind & (channel < OUT_WIDTH), other=0.0)
        taken = tl.where(behind, padding, taken)
    tl.store(out + channel, taken, channel < OUT_WIDTH)


@triton.jit
def _descend_step(
    p,
    rows,
    encoded,
    pad,
    report,
    h,
    inner_rows,
    opened,
    chunk,
    wide,
    length,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    here = tl.arange(0, BLOCK_ROWS)
    inside = here < length
    row = tl.load(rows + here, inside, other=0)
    opens = (tl.load(p + here, inside, other=0.0) > THRESHOLD) & (row > 0)
    source, inner, own = _ranked(opens, row, here, place)
    said = tl.load(p + place)
    tl.store(report + place, said)
    tl.store(inner_rows + place, inner)
    tl.store(chunk + place, own)
    tl.store(opened + place, (said > THRESHOLD) & (tl.load(rows + place) > 0))
    channel = tl.arange(0, BLOCK)
    widen(encoded + source * WIDTH, pad, h + place.to(tl.int64) * OUT_WIDTH, channel, WIDTH, OUT_WIDTH)
    mine = place.to(tl.int64) * WIDTH + channel
    tl.store(wide + mine, tl.load(encoded + mine, channel < WIDTH, other=0.0).to(tl.float32), channel < WIDTH)


@triton.jit
def _park_step(
    p,
    rows,
    encoded,
    parked,
    parked_p,
    report,
    wide,
    ended,
    places,
    length,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    here = tl.arange(0, BLOCK_ROWS)
    inside = here < length
    row = tl.load(rows + here, inside, other=0)
    # What is not a number is above no threshold.
    goes_on = ((tl.load(p + here, inside, other=0.0) > THRESHOLD) == 0) & (row > 0)
    source, inner, _ = _ranked(goes_on, row, here, place)
    tl.store(ended + place, inner)
    tl.store(places + place, source)
    said, own = tl.load(p + place), tl.load(rows + place)
    tl.store(report + place, said)
    channel = tl.arange(0, BLOCK)
    has = channel < WIDTH
    out = place.to(tl.int64) * WIDTH + channel
    tl.store(wide + out, tl.load(encoded + source * WIDTH + channel, has, other=0.0).to(tl.float32), has)
    if (said > THRESHOLD) & (own > 0):
        tl.store(parked_p + own, said)
        tl.store(parked + own * WIDTH + channel, tl.load(encoded + out, has, other=0.0), has)


def _next_batch(
    p: Tensor, rows: Tensor, encoded: Tensor, pad: Tensor | None, report: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, width = encoded.shape
    h = torch.empty((count, width + (0 if pad is None else len(pad))), dtype=encoded.dtype, device=encoded.device)
    opened = torch.empty(count, dtype=torch.bool, device=encoded.device)
    wide = torch.empty((count, width), dtype=torch.float32, device=encoded.device)
    return h, torch.empty_like(rows), opened, torch.empty_like(rows), wide


@operation(fake=_next_batch, mutates=("report",))
def descend_step(
    p: Tensor, rows: Tensor, encoded: Tensor, pad: Tensor | None, report: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.boundary`); ValueError for more than 4096 rows."""
    contiguous(p, rows, encoded, report, *(() if pad is None else (pad,)))
    outputs = _next_batch(p, rows, encoded, pad, report)
    width, out_width = encoded.shape[1], outputs[0].shape[1]
    launch(
        _descend_step,
        (len(rows),),
        p,
        rows,
        encoded,
        encoded if pad is None else pad,
        report,
        *outputs,
        len(rows),
        WIDTH=width,
        OUT_WIDTH=out_width,
        THRESHOLD=BOUNDARY_THRESHOLD,
        BLOCK_ROWS=_ranks(rows),
        BLOCK=power_of_two(out_width),
        num_warps=warps_of(out_width),
    )
    return outputs


def _left(
    p: Tensor, rows: Tensor, encoded: Tensor, parked: Tensor, parked_p: Tensor, report: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.empty(encoded.shape, dtype=torch.float32, device=encoded.device)
    return wide, torch.empty_like(rows), torch.empty_like(rows)


@operation(fake=_left, mutates=("parked", "parked_p", "report"))
def park_step(
    p: Tensor, rows: Tensor, encoded: Tensor, parked: Tensor, parked_p: Tensor, report: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.boundary`); ValueError for more than 4096 rows."""
    contiguous(p, rows, encoded, parked, parked_p, report)
    outputs = _left(p, rows, encoded, parked, parked_p, report)
    width = encoded.shape[1]
    launch(
        _park_step,
        (len(rows),),
        p,
        rows,
        encoded,
        parked,
        parked_p,
        report,
        *outputs,
        len(rows),
        WIDTH=width,
        THRESHOLD=BOUNDARY_THRESHOLD,
        BLOCK_ROWS=_ranks(rows),
        BLOCK=power_of_two(width),
        num_warps=warps_of(width),
    )
    return outputs


def _ranks(rows: Tensor) -> int:
    """Lanes that rank the rows. Not fewer than a warp has: a kernel each for one row, two, four, … gains nothing."""
    if len(rows) > MOST_ROWS:
        raise ValueError(f"{len(rows)} rows; one program ranks {MOST_ROWS}")
    return max(power_of_two(len(rows)), 32)
