"""Attention of one query of each row: rotary, keeping of key and value, then sums over kept ones in fixed pieces."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.attention import BLOCK
from hnet_runtime.ops.rotary import inverse_frequencies
from hnet_runtime.ops.triton.launching import blocks, contiguous, launch, operation, power_of_two

PIECE = 4 * BLOCK
"""Positions that are summed before they are combined. Pieces begin at absolute multiples of it: how a row's keys are
added up does not depend on how many other rows there are, how long any of them may become, or where keys lie."""

LEAST_PROGRAMS, WANTED_PROGRAMS = 8, 2048
"""Programs that share the pieces of one row and head, and of a whole step: a few rows must fill the device, while a
program that finds nothing to do still costs its start."""

KEY_BYTES = 64
"""Of a block of keys, and of one of values, what a thread holds: as much again as sums, and no register is spilled."""

HEADS_AT_ONCE, ROTATE_WARPS = 8, 1
COMBINE_AT_ONCE, COMBINE_WARPS = 8, 1
"""One warp each, so that a thread holds enough of a head for wide loads, and nothing passes between warps."""


@triton.jit
def _rotate_and_keep(
    qkv,
    positions,
    slots,
    frequencies,
    k_store,
    v_store,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    place = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    slot = tl.load(slots + place)
    width: tl.constexpr = HEADS * HEAD_DIM
    within = head * HEAD_DIM
    q = qkv + place * (3 * width) + within
    k, v = q + width, q + 2 * width
    q_out, k_out, v_out = out + place * width + within, k_store + slot * width + within, v_store + slot * width + within
    is_head = head < HEADS
    if HALF > 0:
        channel = tl.arange(0, BLOCK_HALF)
        turns = is_head & (channel < HALF)[None, :]
        angle = tl.load(positions + place).to(tl.float32) * tl.load(frequencies + channel, channel < HALF, other=0.0)
        cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
        first, second = channel[None, :], channel[None, :] + HALF
        q_first = tl.load(q + first, turns, other=0.0).to(tl.float32)
        q_second = tl.load(q + second, turns, other=0.0).to(tl.float32)
        k_first = tl.load(k + first, turns, other=0.0).to(tl.float32)
        k_second = tl.load(k + second, turns, other=0.0).to(tl.float32)
        tl.store(q_out + first, (q_first * cos - q_second * sin).to(out.dtype.element_ty), turns)
        tl.store(q_out + second, (q_first * sin + q_second * cos).to(out.dtype.element_ty), turns)
        # As in the twin, a key is rounded to the model's dtype before it is kept, in whatever dtype that is.
        k_first, k_second = k_first * cos - k_second * sin, k_first * sin + k_second * cos
        model = qkv.dtype.element_ty
        kept = k_store.dtype.element_ty
        tl.store(k_out + first, k_first.to(model).to(tl.float32).to(kept), turns)
        tl.store(k_out + second, k_second.to(model).to(tl.float32).to(kept), turns)
    if HEAD_DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        stays = is_head & (rest < HEAD_DIM)
        tl.store(q_out + rest, tl.load(q + rest, stays, other=0.0), stays)
        tl.store(k_out + rest, tl.load(k + rest, stays, other=0.0).to(tl.float32).to(k_store.dtype.element_ty), stays)
    all_of_it = tl.arange(0, BLOCK_P)[None, :]
    has = is_head & (all_of_it < HEAD_DIM)
    value = tl.load(v + all_of_it, has, other=0.0).to(tl.float32)
    tl.store(v_out + all_of_it, value.to(v_store.dtype.element_ty), has)


@triton.jit
def _attend_piece(
    q,
    k_store,
    v_store,
    rows,
    positions,
    table,
    largest,
    total,
    mixed,
    table_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPACITY: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCALE: tl.constexpr,
):
    head = tl.program_id(0)
    place = tl.program_id(2).to(tl.int64)
    newest = tl.load(positions + place).to(tl.int32)
    oldest = newest * 0
    if WINDOW >= 0:
        oldest = tl.maximum(newest - WINDOW, 0)
    first = oldest // PIECE
    row = tl.load(rows + place)
    channel = tl.arange(0, BLOCK_P)
    has_channel = channel < HEAD_DIM
    own = head * HEAD_DIM + channel
    query = tl.load(q + place * (HEADS * HEAD_DIM) + own, has_channel, other=0.0).to(tl.float32) * SCALE
    # Which program takes a piece changes nothing in it, so that how many there are may depend on the step's size.
    for piece in range(tl.program_id(1), tl.minimum(newest // PIECE - first + 1, PIECES), tl.num_programs(1)):
        begin = (first + piece) * PIECE
        # Each of the BLOCK places in a block keeps its own maximum and sums: nothing passes between them until the end.
        high = tl.full([BLOCK], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK], tl.float32)
        value_sum = tl.zeros([BLOCK, BLOCK_P], tl.float32)
        from_block = tl.maximum(begin, oldest // BLOCK * BLOCK)
        for block in range(from_block, tl.minimum(begin + PIECE, newest + 1), BLOCK):
            key = block + tl.arange(0, BLOCK)
            seen = (key >= oldest) & (key <= newest)
            if CAPACITY > 0:
                slot = row * CAPACITY + (key % CAPACITY).to(tl.int64)
            else:
                page = tl.load(table + row * table_stride + block // BLOCK)
                slot = page * BLOCK + (key - block).to(tl.int64)
            where = slot[:, None] * (HEADS * HEAD_DIM) + own[None, :]
            loaded = seen[:, None] & has_channel[None, :]
            keys = tl.load(k_store + where, loaded, other=0.0).to(tl.float32)
            values = tl.load(v_store + where, loaded, other=0.0).to(tl.float32)
            score = tl.where(seen, tl.sum(keys * query[None, :], 1), float("-inf"))
            higher = tl.maximum(high, score)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            fade, now = tl.exp(high - base), tl.exp(score - base)
            weight = weight * fade + now
            value_sum = value_sum * fade[:, None] + now[:, None] * values
            high = higher
        top = tl.max(high, 0)
        scale = tl.exp(high - top)
        weight_sum = tl.sum(weight * scale, 0)
        out = tl.sum(value_sum * scale[:, None], 0)
        if PIECES == 1:
            tl.store(
                mixed + place * (HEADS * HEAD_DIM) + own, (out / weight_sum).to(mixed.dtype.element_ty), has_channel
            )
        else:
            index = (place * PIECES + piece) * HEADS + head
            tl.store(largest + index, top)
            tl.store(total + index, weight_sum)
            tl.store(mixed + index * HEAD_DIM + channel, out, has_channel)


@triton.jit
def _combine_pieces(
    largest,
    total,
    mixed,
    positions,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(0)
    place = tl.program_id(1).to(tl.int64)
    newest = tl.load(positions + place).to(tl.int32)
    oldest = newest * 0
    if WINDOW >= 0:
        oldest = tl.maximum(newest - WINDOW, 0)
    count = tl.minimum(newest // PIECE - oldest // PIECE + 1, PIECES)  # of pieces that have a key
    channel = tl.arange(0, BLOCK_P)
    has_channel = channel < HEAD_DIM
    high = tl.full([AT_ONCE], float("-inf"), tl.float32)
    weight = tl.zeros([AT_ONCE], tl.float32)
    value_sum = tl.zeros([AT_ONCE, BLOCK_P], tl.float32)
    for begin in range(0, count, AT_ONCE):
        piece = begin + tl.arange(0, AT_ONCE)
        exists = piece < count
        index = (place * PIECES + piece) * HEADS + head
        theirs = tl.load(largest + index, exists, other=float("-inf"))
        their_weight = tl.load(total + index, exists, other=0.0)
        values = tl.load(mixed + index[:, None] * HEAD_DIM + channel[None, :], exists[:, None] & has_channel[None, :])
        values = tl.where(exists[:, None], values, 0.0)
        higher = tl.maximum(high, theirs)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, now = tl.exp(high - base), tl.exp(theirs - base)
        weight = weight * fade + their_weight * now
        value_sum = value_sum * fade[:, None] + values * now[:, None]
        high = higher
    scale = tl.exp(high - tl.max(high, 0))
    result = tl.sum(value_sum * scale[:, None], 0) / tl.sum(weight * scale, 0)
    where = out + (place * HEADS + head) * HEAD_DIM + channel
    tl.store(where, result.to(out.dtype.element_ty), has_channel)


@lru_cache
def _frequencies(rotary_dim: int, device: torch.device) -> Tensor:
    """The twin's, of which powers on the device might differ by a bit. Made before a capture begins, in the warm-up."""
    return inverse_frequencies(rotary_dim, torch.device("cpu")).to(device)


def _rotated(
    qkv: Tensor, positions: Tensor, slots: Tensor, k_store: Tensor, v_store: Tensor, rotary_dim: int
) -> Tensor:
    return torch.empty((qkv.shape[0], *qkv.shape[2:]), dtype=qkv.dtype, device=qkv.device)


@operation(fake=_rotated, mutates=("k_store", "v_store"))
def rotate_and_keep(
    qkv: Tensor, positions: Tensor, slots: Tensor, k_store: Tensor, v_store: Tensor, rotary_dim: int
) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.attention`)."""
    contiguous(qkv, positions, slots, k_store, v_store)
    count, _, heads, head_dim = qkv.shape
    q = _rotated(qkv, positions, slots, k_store, v_store, rotary_dim)
    half = rotary_dim // 2
    block = min(HEADS_AT_ONCE, power_of_two(heads))
    launch(
        _rotate_and_keep,
        (blocks(heads, block), count),
        qkv,
        positions,
        slots,
        _frequencies(max(rotary_dim, 2), qkv.device),
        k_store,
        v_store,
        q,
        HEADS=heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_H=block,
        BLOCK_HALF=power_of_two(max(half, 1)),
        BLOCK_REST=power_of_two(max(head_dim - 2 * half, 1)),
        BLOCK_P=power_of_two(head_dim),
        num_warps=ROTATE_WARPS,
        enable_fp_fusion=False,  # so that a key is the same whether prefill or a step has turned it
    )
    return q


def pieces_seen(window: int, max_positions: int) -> int:
    """Pieces in which a query sees keys, at most."""
    every = blocks(max_positions, PIECE)
    return every if window < 0 else min(every, blocks(window, PIECE) + 1)


def _answer(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    rows: Tensor,
    positions: Tensor,
    table: Tensor | None,
    window: int,
    capacity: int | None,
    max_positions: int,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@operation(fake=_answer)
def decode_attention(
    q: Tensor,
    k_store: Tensor,
    v_store: Tensor,
    rows: Tensor,
    positions: Tensor,
    table: Tensor | None,
    window: int,
    capacity: int | None,
    max_positions: int,
) -> Tensor:
    """The twin's contract (`hnet_runtime.ops.attention`)."""
    contiguous(q, k_store, v_store, rows, positions, *(() if table is None else (table,)))
    if (table is None) == (capacity is None):
        raise ValueError("keys are in pages or in a ring")
    count, heads, head_dim = q.shape
    pieces = pieces_seen(window, max_positions)
    out = _answer(q, k_store, v_store, rows, positions, table, window, capacity, max_positions)
    largest, total, mixed = out, out, out
    if pieces > 1:
        largest, total = torch.empty((2, count, pieces, heads), dtype=torch.float32, device=q.device).unbind(0)
        mixed = torch.empty((count, pieces, heads, head_dim), dtype=torch.float32, device=q.device)
    common: dict[str, Any] = {"HEADS": heads, "HEAD_DIM": head_dim, "WINDOW": window, "PIECES": pieces, "PIECE": PIECE}
    block_p = power_of_two(head_dim)
    launch(
        _attend_piece,
        (heads, min(pieces, max(LEAST_PROGRAMS, blocks(WANTED_PROGRAMS, max(heads * count, 1)))), count),
        q,
        k_store,
        v_store,
        rows,
        positions,
        rows if table is None else table,
        largest,
        total,
        mixed,
        0 if table is None else table.stride(0),
        **common,
        CAPACITY=capacity or 0,
        BLOCK=BLOCK,
        BLOCK_P=block_p,
        SCALE=head_dim**-0.5,
        num_warps=max(BLOCK * block_p * k_store.element_size() // (32 * KEY_BYTES), 1),
    )
    if pieces > 1:
        launch(
            _combine_pieces,
            (heads, count),
            largest,
            total,
            mixed,
            positions,
            out,
            **common,
            AT_ONCE=COMBINE_AT_ONCE,
            BLOCK_P=block_p,
            num_warps=COMBINE_WARPS,
        )
    return out
