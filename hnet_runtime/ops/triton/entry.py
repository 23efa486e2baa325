"""What a step begins with, bytes or what rows waited with: a program a row."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.entry import NO_BYTE, UNREAD
from hnet_runtime.ops.triton.boundary import widen
from hnet_runtime.ops.triton.launching import contiguous, launch, operation, power_of_two
from hnet_runtime.ops.triton.norm import warps_of


@triton.jit
def _enter_step(
    rows,
    data,
    next_bytes,
    embeddings,
    ran,
    live,
    h,
    WIDTH: tl.constexpr,
    UNREAD: tl.constexpr,
    NO_BYTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, byte = tl.load(rows + place), tl.load(data + place)
    drawn = tl.load(next_bytes + row)
    byte = tl.where(byte == UNREAD, drawn, byte)
    runs = tl.where(byte == NO_BYTE, 0, row)
    tl.debug_barrier()  # every warp reads the byte for itself: none may find it gone
    tl.store(next_bytes + row, NO_BYTE)
    tl.store(live + place, runs)
    tl.store(ran + place, (runs > 0).to(tl.float32))
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    taken = tl.load(embeddings + tl.maximum(byte, 0) * WIDTH + channel, inside, other=0.0)
    tl.store(h + place * WIDTH + channel, taken, inside)


@triton.jit
def _resume_step(rows, parked, pad, ran, h, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    tl.store(ran + place, (row > 0).to(tl.float32))
    widen(parked + row * WIDTH, pad, h + place * OUT_WIDTH, tl.arange(0, BLOCK), WIDTH, OUT_WIDTH)


@triton.jit
def _surface_step(rows, parked, parked_p, wide, p, opened, chunk, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    tl.store(p + place, tl.load(parked_p + row))
    tl.store(opened + place, row > 0)
    tl.store(chunk + place, place)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    taken = tl.load(parked + row * WIDTH + channel, inside, other=0.0)
    tl.store(wide + place * WIDTH + channel, taken.to(tl.float32), inside)


def _entered(rows: Tensor, data: Tensor, next_bytes: Tensor, embeddings: Tensor, ran: Tensor) -> tuple[Tensor, Tensor]:
    shape = len(rows), embeddings.shape[1]
    return torch.empty_like(rows), torch.empty(shape, dtype=embeddings.dtype, device=rows.device)


@operation(fake=_entered, mutates=("next_bytes", "ran"))
def enter_step(
    rows: Tensor, data: Tensor, next_bytes: Tensor, embeddings: Tensor, ran: Tensor
) -> tuple[Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.entry`)."""
    contiguous(rows, data, next_bytes, embeddings, ran)
    live, h = _entered(rows, data, next_bytes, embeddings, ran)
    width = h.shape[1]
    launch(
        _enter_step,
        (len(rows),),
        rows,
        data,
        next_bytes,
        embeddings,
        ran,
        live,
        h,
        WIDTH=width,
        UNREAD=UNREAD,
        NO_BYTE=NO_BYTE,
        BLOCK=power_of_two(width),
        num_warps=warps_of(width),
    )
    return live, h


def _resumed(rows: Tensor, parked: Tensor, pad: Tensor | None, ran: Tensor) -> Tensor:
    width = parked.shape[1] + (0 if pad is None else len(pad))
    return torch.empty((len(rows), width), dtype=parked.dtype, device=rows.device)


@operation(fake=_resumed, mutates=("ran",))
def resume_step(rows: Tensor, parked: Tensor, pad: Tensor | None, ran: Tensor) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.entry`)."""
    contiguous(rows, parked, ran, *(() if pad is None else (pad,)))
    h = _resumed(rows, parked, pad, ran)
    width = h.shape[1]
    launch(
        _resume_step,
        (len(rows),),
        rows,
        parked,
        parked if pad is None else pad,
        ran,
        h,
        WIDTH=parked.shape[1],
        OUT_WIDTH=width,
        BLOCK=power_of_two(width),
        num_warps=warps_of(width),
    )
    return h


def _surfaced(rows: Tensor, parked: Tensor, parked_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(rows)
    wide = torch.empty((count, parked.shape[1]), dtype=torch.float32, device=rows.device)
    p, opened = (torch.empty(count, dtype=dtype, device=rows.device) for dtype in (torch.float32, torch.bool))
    return wide, p, opened, torch.empty_like(rows)


@operation(fake=_surfaced)
def surface_step(rows: Tensor, parked: Tensor, parked_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The twin's contract (`hnet_runtime.ops.entry`)."""
    contiguous(rows, parked, parked_p)
    outputs = _surfaced(rows, parked, parked_p)
    width = parked.shape[1]
    launch(
        _surface_step,
        (len(rows),),
        rows,
        parked,
        parked_p,
        *outputs,
        WIDTH=width,
        BLOCK=power_of_two(width),
        num_warps=warps_of(width),
    )
    return outputs
