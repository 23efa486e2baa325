"""A row's next byte and what is kept of it: one program a row, a lane a byte."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.ops.drawing import AS_GIVEN, AS_LEFT, MASKS
from hnet_runtime.ops.entry import NO_BYTE
from hnet_runtime.ops.sampling import NOT_FINITE
from hnet_runtime.ops.triton.launching import contiguous, launch, operation, row_stride
from hnet_runtime.ops.triton.sampling import TOGETHER, sampled

WARPS = 8


@triton.jit
def _draw_step(
    projected,
    rows,
    places,
    numbers,
    given,
    masks,
    following,
    states,
    next_bytes,
    logits,
    drawn,
    projected_stride,
    numbers_stride,
    HAS_PLACES: tl.constexpr,
    BYTES: tl.constexpr,
    TOGETHER: tl.constexpr,
    AS_GIVEN: tl.constexpr,
    AS_LEFT: tl.constexpr,
    MASKS: tl.constexpr,
    NO_BYTE: tl.constexpr,
    NOT_FINITE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    place = index
    if HAS_PLACES:
        place = tl.load(places + index)
    asked = numbers + place  # temperature, top_p, min_p, uniform, top_k, state, mask
    state, mask = tl.load(asked + 5 * numbers_stride).to(tl.int64), tl.load(asked + 6 * numbers_stride).to(tl.int64)
    state = tl.where(state == AS_LEFT, tl.load(states + row), state)
    own = given + place * (2 * BYTES)
    automatic = masks + (state * MASKS + tl.maximum(mask, 0)) * BYTES
    allowed = tl.where(mask == AS_GIVEN, own, automatic)

    byte = tl.arange(0, BYTES)
    projected += index * projected_stride
    tl.store(logits + index * BYTES + byte, tl.load(projected + byte).to(tl.float32))
    found = sampled(
        projected,
        allowed,
        tl.load(asked),
        tl.load(asked + numbers_stride),
        tl.load(asked + 2 * numbers_stride),
        tl.load(asked + 3 * numbers_stride),
        tl.load(asked + 4 * numbers_stride).to(tl.int32),
        BYTES,
        TOGETHER,
        NOT_FINITE,
    )
    tl.store(drawn + index, found.to(tl.float32))
    some = tl.maximum(found, 0)
    tl.store(states + row, tl.load(following + state * BYTES + some))
    pauses = tl.load(own + BYTES + some) != 0
    tl.store(next_bytes + row, tl.where(pauses, NO_BYTE, found).to(tl.int64))


def _nothing(*_: object) -> None:
    return None


@operation(fake=_nothing, mutates=("states", "next_bytes", "logits", "drawn"))
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
    """The twin's contract (`hnet_runtime.ops.drawing`), for V = 256; numbers may be a view with any row stride.

    Sums are in fp64, but in another order than the twin's: a draw may differ where it falls within 1e−15 of a border.
    """
    contiguous(rows, given, masks, following, states, next_bytes, logits, drawn)
    contiguous(*(() if places is None else (places,)))
    if projected.shape[1] != VOCAB_SIZE:
        raise ValueError(f"logits of {projected.shape[1]} bytes")
    launch(
        _draw_step,
        (len(rows),),
        projected,
        rows,
        rows if places is None else places,
        numbers,
        given,
        masks,
        following,
        states,
        next_bytes,
        logits,
        drawn,
        row_stride(projected),
        row_stride(numbers),
        HAS_PLACES=places is not None,
        BYTES=VOCAB_SIZE,
        TOGETHER=TOGETHER,
        AS_GIVEN=AS_GIVEN,
        AS_LEFT=AS_LEFT,
        MASKS=MASKS,
        NO_BYTE=NO_BYTE,
        NOT_FINITE=NOT_FINITE,
        num_warps=WARPS,
    )
