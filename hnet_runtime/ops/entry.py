"""What a step begins with: bytes, or what rows waited with."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.ops.boundary import widened

UNREAD = -1  # a byte that the device alone knows: the one it drew for the row last
NO_BYTE = -1  # the next byte of a row that waits, is over, or is not to go on before the host has looked


def enter_step(
    rows: Tensor, data: Tensor, next_bytes: Tensor, embeddings: Tensor, ran: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows that have a byte to run, padding in place of the others, and what they run.

    rows, data: [B] int64, a byte of each, or UNREAD where it is what the row drew, next_bytes: [rows] int64 what each
    row drew last (updated in place: NO_BYTE until it draws again, which a row that parks does not), embeddings: [V, D],
    ran: [B] fp32 (takes 1 where a row runs, else 0) → live: [B] int64, h: [B, D].
    """
    byte = torch.where(data == UNREAD, next_bytes.index_select(0, rows), data)
    live = torch.where(byte == NO_BYTE, 0, rows)
    next_bytes.index_copy_(0, rows, torch.full_like(rows, NO_BYTE))
    ran.copy_(live > 0)
    return live, embeddings.index_select(0, byte.clamp(min=0))


def resume_step(rows: Tensor, parked: Tensor, pad: Tensor | None, ran: Tensor) -> Tensor:
    """What rows waited with, as the next stage takes it.

    rows: [B] int64, parked: [rows, D], pad: [W − D] or None, ran: [B] fp32 (takes 1 where a row runs, else 0)
    → h: [B, W].
    """
    ran.copy_(rows > 0)
    return widened(parked.index_select(0, rows), pad)


def surface_step(rows: Tensor, parked: Tensor, parked_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stage above the one a step began at, as its rows left it when they parked: each with a chunk open.

    rows: [B] int64, parked: [rows, D], parked_p: [rows] fp32 → wide: [B, D] fp32; p: [B] fp32; opened: [B] bool, but
    of padding; chunk: [B] int64, each row's own place.
    """
    chunk = torch.arange(len(rows), device=rows.device)
    return parked.index_select(0, rows).float(), parked_p.index_select(0, rows), rows > 0, chunk
