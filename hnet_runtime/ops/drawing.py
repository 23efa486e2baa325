"""A row's next byte, and what a step keeps of it for the row's next step."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.ops.entry import NO_BYTE
from hnet_runtime.ops.sampling import sample_step

NUMBERS = ("temperature", "top_p", "min_p", "uniform", "top_k", "state", "mask")  # the last three whole, exact in fp64
AS_GIVEN = -1  # `mask` of a row whose bytes are `allowed`,
AS_LEFT = -1  # and `state` of one whose state is that in which its last draw left it
MASKS = 8  # of each state of the automaton


def draw_step(
    projected: Tensor,
    rows: Tensor,
    places: Tensor | None,
    numbers: Tensor,
    given: Tensor,
    masks: Tensor,
    following: Tensor,
    states: Tensor,
    next_bytes: Tensor,
    logits: Tensor,
    drawn: Tensor,
) -> None:
    """Draws the next byte of each row, and keeps it for its next step.

    projected: [B, V] in the model's dtype, rows: [B] int64, places: [B] int64 where these rows stand among those that
    numbers and given are of, None where they are the same, numbers: [7, B] fp64 NUMBERS, given: [B, 2, V] bool the
    bytes that are allowed, where `mask` is AS_GIVEN, and those after which a row does not go on by itself,
    masks: [8 · states, V] bool the bytes that may come by state and mask, following: [states · V] int64 the state after
    each byte in each state. Written: states: [rows] int64 the row's state after its byte, next_bytes: [rows] int64 the
    byte, or NO_BYTE where it is none to go on with, logits: [B, V] fp32, drawn: [B] fp32 the byte, −1 where the
    logits are not all finite.
    """
    logits.copy_(projected)
    if places is not None:
        numbers, given = numbers.index_select(1, places), given.index_select(0, places)
    temperature, top_p, min_p, uniform, top_k, known, mask = numbers.unbind(0)
    allowed, pauses = given.unbind(1)
    state = torch.where(known == AS_LEFT, states.index_select(0, rows), known.long())
    automatic = masks.index_select(0, state * MASKS + mask.long().clamp(min=0))
    allowed = torch.where((mask == AS_GIVEN)[:, None], allowed, automatic)
    byte = sample_step(logits, allowed, temperature, top_p, min_p, uniform, top_k.long())
    drawn.copy_(byte)
    some = byte.clamp(min=0)
    states.index_copy_(0, rows, following.index_select(0, state * VOCAB_SIZE + some))
    pauses_here = pauses.gather(1, some[:, None]).squeeze(1)
    next_bytes.index_copy_(0, rows, torch.where(pauses_here, NO_BYTE, byte))
