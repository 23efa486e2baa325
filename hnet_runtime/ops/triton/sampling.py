"""The draw of the next byte: one program a row, a lane a byte, sums and comparisons in fp64."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.ops.sampling import NOT_FINITE
from hnet_runtime.ops.triton.launching import contiguous, launch, operation, row_stride

TOGETHER, WARPS = 16, 8
"""Bytes that a lane compares its own with at once, when it looks for its rank."""


@triton.jit
def _weights(logits, allowed, byte, largest, temperature):
    """exp((logit − largest) / temperature) of these bytes, 0 where one is not allowed: fp64."""
    logit = tl.load(logits + byte)
    logit = tl.where(tl.load(allowed + byte) != 0, logit, float("-inf"))
    return tl.exp((logit.to(tl.float64) - largest) / temperature)


@triton.jit
def _sample_step(
    logits,
    allowed,
    temperature,
    top_p,
    min_p,
    uniform,
    top_k,
    out,
    logits_stride,
    allowed_stride,
    BYTES: tl.constexpr,
    TOGETHER: tl.constexpr,
    NOT_FINITE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    logits += place * logits_stride
    allowed += place * allowed_stride
    byte = tl.arange(0, BYTES)
    raw = tl.load(logits + byte)
    is_sound = tl.min((tl.abs(raw) < float("inf")).to(tl.int32), 0)  # of what is not a number this is false
    masked = tl.where(tl.load(allowed + byte) != 0, raw, float("-inf"))
    highest = tl.max(masked, 0)
    drawn = tl.min(tl.where(masked == highest, byte, BYTES), 0)  # the first of equals

    heat = tl.load(temperature + place)
    if heat != 0.0:
        largest = highest.to(tl.float64)
        weight = _weights(logits, allowed, byte, largest, heat)
        most, nucleus, least = tl.load(top_k + place), tl.load(top_p + place), tl.load(min_p + place)
        most = tl.where(most == 0, BYTES, most)
        if (most < BYTES) | (nucleus < 1.0):
            # How many bytes stand before a byte in falling order, ties by number, and what they weigh together.
            rank = tl.zeros([BYTES], tl.int32)
            before = tl.zeros([BYTES], tl.float64)
            for begin in range(0, BYTES, TOGETHER):
                other = begin + tl.arange(0, TOGETHER)
                theirs = _weights(logits, allowed, other, largest, heat)
                ahead = (theirs[None, :] > weight[:, None]) | (
                    (theirs[None, :] == weight[:, None]) & (other[None, :] < byte[:, None])
                )
                rank += tl.sum(ahead.to(tl.int32), 1)
                before += tl.sum(tl.where(ahead, theirs[None, :], 0.0), 1)
            kept = tl.where(rank < most, weight, 0.0)
            inside = before < nucleus * tl.sum(kept, 0)
            # At 1.0 nothing is cut, whatever the rounding of the sums.
            weight = tl.where(inside, kept, tl.where(nucleus >= 1.0, kept, 0.0))
        weight = tl.where(weight >= least, weight, 0.0)  # the largest weight is exp(0) = 1
        cumulative = tl.cumsum(weight, 0)
        target = tl.max(cumulative, 0) * tl.load(uniform + place)
        # The first byte that weighs anything and passes the target; rounding must not carry it past the last.
        passing = tl.min(tl.where(cumulative > target, tl.where(weight > 0.0, byte, BYTES), BYTES), 0)
        last = tl.max(tl.where(weight > 0.0, byte, 0), 0)
        drawn = tl.minimum(passing, last)
    tl.store(out + place, tl.where(is_sound != 0, drawn, NOT_FINITE).to(tl.int64))


def _empty(logits: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(len(logits), dtype=torch.int64, device=logits.device)


@operation(fake=_empty)
def sample_step(
    logits: Tensor, allowed: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, top_k: Tensor
) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.sampling`), for V = 256.

    Sums are in fp64, but in another order than the twin's: a draw may differ where it falls within 1e−15 of a border.
    """
    contiguous(temperature, top_p, min_p, uniform, top_k)
    if logits.shape[1] != VOCAB_SIZE:
        raise ValueError(f"logits of {logits.shape[1]} bytes")
    out = _empty(logits)
    launch(
        _sample_step,
        (len(logits),),
        logits,
        allowed,
        temperature,
        top_p,
        min_p,
        uniform,
        top_k,
        out,
        row_stride(logits),
        row_stride(allowed),
        BYTES=VOCAB_SIZE,
        TOGETHER=TOGETHER,
        NOT_FINITE=NOT_FINITE,
        num_warps=WARPS,
    )
    return out
