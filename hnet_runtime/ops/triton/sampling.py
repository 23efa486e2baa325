"""The draw of a byte, for kernels that give a row a program and a byte a lane: sums and comparisons in fp64."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

TOGETHER = 16
"""Bytes that a lane compares its own with at once, when it looks for its rank."""


@triton.jit
def _weights(logits, allowed, byte, largest, temperature):
    """exp((logit − largest) / temperature) of these bytes, 0 where one is not allowed: fp64."""
    logit = tl.load(logits + byte).to(tl.float32)
    logit = tl.where(tl.load(allowed + byte) != 0, logit, float("-inf"))
    return tl.exp((logit.to(tl.float64) - largest) / temperature)


@triton.jit
def sampled(
    logits,
    allowed,
    heat,
    nucleus,
    least,
    uniform,
    most,
    BYTES: tl.constexpr,
    TOGETHER: tl.constexpr,
    NOT_FINITE: tl.constexpr,
):
    """`hnet_runtime.ops.sampling.sample_step` of a row: logits, allowed: pointers to a row's; heat, nucleus, least,
    uniform: fp64; most: int32, how many bytes are left, 0 for all."""
    byte = tl.arange(0, BYTES)
    raw = tl.load(logits + byte).to(tl.float32)
    is_sound = tl.min((tl.abs(raw) < float("inf")).to(tl.int32), 0)  # of what is not a number this is false
    masked = tl.where(tl.load(allowed + byte) != 0, raw, float("-inf"))
    highest = tl.max(masked, 0)
    drawn = tl.min(tl.where(masked == highest, byte, BYTES), 0)  # the first of equals

    if heat != 0.0:
        largest = highest.to(tl.float64)
        weight = _weights(logits, allowed, byte, largest, heat)
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
        target = tl.max(cumulative, 0) * uniform
        # The first byte that weighs anything and passes the target; rounding must not carry it past the last.
        passing = tl.min(tl.where(cumulative > target, tl.where(weight > 0.0, byte, BYTES), BYTES), 0)
        last = tl.max(tl.where(weight > 0.0, byte, 0), 0)
        drawn = tl.minimum(passing, last)
    return tl.where(is_sound != 0, drawn, NOT_FINITE)
