"""Attention of spans over keys that are kept by stage position, and over the spans' own.

A span's own keys are read where they stand, and kept only after every query has been served: in a ring they take the
places of keys that the span's earlier queries still see.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton.launching import blocks, launch, power_of_two
from hnet_runtime.ops.triton.packed_spans import TILE, PackedSpans, position_stride
from hnet_runtime.ops.triton.products import block_of, product, wide_product

QUERIES, KEYS, ATTEND_WARPS = 64, 64, 4  # of one program; of one of its turns
FP32_QUERIES, FP32_KEYS, FP32_ATTEND_WARPS = 16, 32, 4  # fp32 operands take more registers
KEEP_CHANNELS, KEEP_WARPS = 1024, 4
ROTATE_WARPS = 1


@dataclass(frozen=True)
class Keys:
    """Which keys the queries of `spans` see and where they are kept: what ops.attention.KeyGrid says, for kernels.

    window: positions before a query that it sees; −1 sees all. Kept are they either in pages, position p of a row at
    table[row, p // 64] · 64 + p % 64 of `table` [rows, pages] int64 on the device, or in a ring, at
    row · capacity + p % capacity with `capacity` > window. Exactly one of both is given.
    """

    spans: Spans
    window: int
    table: Tensor | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        if (self.table is None) == (self.capacity is None):
            raise ValueError("keys are kept in pages or in a ring")
        if self.capacity is not None and not 0 <= self.window < self.capacity:
            raise ValueError(f"a ring of {self.capacity} positions does not hold a window of {self.window} before one")


@triton.jit
def attend_spans(
    q_ptr,  # [T, H, P]
    k_ptr,  # [T, H, P]
    v_ptr,  # [T, H, P]
    k_store_ptr,  # [slots, H, P]
    v_store_ptr,  # [slots, H, P]
    table_ptr,  # [rows, pages] where PAGED
    out_ptr,  # [T, H, P]
    tile_span_ptr,
    tile_begin_ptr,
    tile_size_ptr,
    offsets_ptr,
    rows_ptr,
    starts_ptr,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    capacity,
    window,
    scale,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    NARROW: tl.constexpr,
):
    """One tile of queries of one head, over the blocks of keys that any of them sees, in order of position."""
    head = tl.program_id(0)
    tile, part = tl.program_id(1) // (TILE // QUERIES), tl.program_id(1) % (TILE // QUERIES)
    span = tl.load(tile_span_ptr + tile)
    begin = tl.load(tile_begin_ptr + tile)
    size = tl.load(tile_size_ptr + tile)
    start = tl.load(starts_ptr + span)
    row = tl.load(rows_ptr + span)
    channels = tl.arange(0, BLOCK_P)
    inside = channels < P
    # A query stands in the tile where its absolute position says, however its span is cut.
    earliest, latest = start + begin, start + begin + size - 1
    first = earliest // TILE * TILE + part * QUERIES
    queries = first + tl.arange(0, QUERIES)
    own = (queries >= earliest) & (queries <= latest)
    places = tl.load(offsets_ptr + queries - start, mask=own, other=0) + span
    places = tl.where(own, places, 0)
    mask = own[:, None] & inside[None, :]
    within = head * P + channels
    q = tl.load(q_ptr + places[:, None] * q_stride + within[None, :], mask=mask, other=0.0)

    earliest, latest = tl.maximum(earliest, first), tl.minimum(latest, first + QUERIES - 1)
    oldest = tl.zeros_like(earliest)
    if WINDOWED:
        oldest = tl.maximum(earliest - window, 0)
    largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    out = tl.zeros((QUERIES, BLOCK_P), dtype=tl.float32)
    for block in range(oldest // KEYS, latest // KEYS + 1):
        positions = block * KEYS + tl.arange(0, KEYS)
        kept = (positions >= oldest) & (positions < start)
        new = (positions >= start) & (positions <= latest)
        if PAGED:
            slots = tl.load(table_ptr + row * table_stride + block * KEYS // TILE) * TILE + positions % TILE
        else:
            slots = row * capacity + positions % capacity
        found = slots * (H * P)
        fresh = tl.load(offsets_ptr + positions - start, mask=new, other=0) + span
        there = (kept | new)[:, None] & inside[None, :]
        own_key = new[:, None]
        k_at = tl.where(own_key, (k_ptr + fresh * k_stride)[:, None], (k_store_ptr + found)[:, None])
        k = tl.load(k_at + within[None, :], mask=there, other=0.0)

        seen = positions[None, :] <= queries[:, None]
        if WINDOWED:
            seen = seen & (positions[None, :] >= queries[:, None] - window)
        scores = tl.where(seen, product(q, tl.trans(k), NARROW) * scale, float("-inf"))
        # A block that a query sees nothing of changes none of its numbers: factor 1, weights 0.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        factor = tl.exp(largest - reference)
        weights = tl.exp(scores - reference[:, None])
        total = total * factor + tl.sum(weights, 1)
        v_at = tl.where(own_key, (v_ptr + fresh * v_stride)[:, None], (v_store_ptr + found)[:, None])
        v = tl.load(v_at + within[None, :], mask=there, other=0.0)
        out = out * factor[:, None] + wide_product(weights, v, NARROW)
        largest = new_largest
    out = out / total[:, None]
    tl.store(out_ptr + places[:, None] * (H * P) + within[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep_spans(
    k_ptr,  # [T, H · P]
    v_ptr,  # [T, H · P]
    k_store_ptr,  # [slots, H · P]
    v_store_ptr,  # [slots, H · P]
    table_ptr,
    span_of_ptr,
    time_of_ptr,
    rows_ptr,
    starts_ptr,
    lengths_ptr,
    k_stride,
    v_stride,
    table_stride,
    capacity,
    WIDTH: tl.constexpr,  # H · P
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Keeps one position's key and value, unless its span goes on past where its place in the ring is taken anew."""
    place = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    span = tl.load(span_of_ptr + place)
    time = tl.load(time_of_ptr + place)
    row = tl.load(rows_ptr + span)
    position = tl.load(starts_ptr + span) + time
    if PAGED:
        slot = tl.load(table_ptr + row * table_stride + position // TILE) * TILE + position % TILE
        inside = channels < WIDTH
    else:
        slot = row * capacity + position % capacity
        remaining = tl.load(lengths_ptr + span) - time  # positions from this one to the span's last
        inside = channels < tl.where(remaining <= capacity, WIDTH, 0)
    k = tl.load(k_ptr + place * k_stride + channels, mask=inside, other=0.0)
    v = tl.load(v_ptr + place * v_stride + channels, mask=inside, other=0.0)
    tl.store(k_store_ptr + slot * WIDTH + channels, k.to(k_store_ptr.dtype.element_ty), mask=inside)
    tl.store(v_store_ptr + slot * WIDTH + channels, v.to(v_store_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_spans(
    x_ptr,  # [T, H, P]
    cos_ptr,  # [T, HALF] fp32
    sin_ptr,  # [T, HALF] fp32
    out_ptr,  # [T, H, P]
    x_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """All heads of one position: channel i turned with i + HALF, what is past both copied."""
    place = tl.program_id(0).to(tl.int64)
    heads, channels = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    turned = channels < HALF
    mask = (heads < H)[:, None] & turned[None, :]
    cos = tl.load(cos_ptr + place * HALF + channels, mask=turned, other=0.0)[None, :]
    sin = tl.load(sin_ptr + place * HALF + channels, mask=turned, other=0.0)[None, :]
    first = heads[:, None] * P + channels[None, :]
    a = tl.load(x_ptr + place * x_stride + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place * x_stride + first + HALF, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + place * H * P
    tl.store(out + first, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + first + HALF, (a * sin + b * cos).to(out_ptr.dtype.element_ty), mask=mask)
    if P > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        rest_mask = (heads < H)[:, None] & (rest < P)[None, :]
        rest_index = heads[:, None] * P + rest[None, :]
        tl.store(out + rest_index, tl.load(x_ptr + place * x_stride + rest_index, mask=rest_mask), mask=rest_mask)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """ops.rotary.rotate: turns channel i together with channel i + half by the table's angles; the rest passes.

    x: [T, H, P] fp32 or bf16, heads and channels of a position side by side; table: cos and sin, [T, 1, half] fp32 →
    [T, H, P] in x's dtype. Raises ValueError where they are not side by side.
    """
    total, heads, head_dim = x.shape
    half = table[0].shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        rotate_spans, (total,),
        x, *table, out, position_stride(x),
        H=heads, P=head_dim, HALF=half, BLOCK_H=power_of_two(heads),
        BLOCK_HALF=power_of_two(half), BLOCK_REST=power_of_two(max(1, head_dim - 2 * half)),
        num_warps=ROTATE_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, k_store: Tensor, v_store: Tensor, keys: Keys) -> Tensor:
    """ops.attention.attend: softmax(q Kᵀ / √P) V over the keys each query sees; then keeps k and v in the stores.

    q, k, v: [T, H, P] packed, rotated, heads and channels of a position side by side; k_store, v_store: [slots, H, P]
    (updated in place) → [T, H, P] in q's dtype. Sums are in fp32 over blocks of 64 absolute positions (of 32 in fp32
    models) in order, with a running maximum: what a query gets depends on its own row only, however that is cut into
    spans. Raises ValueError where they are not side by side, or the stores are not in the dtype of k and v.
    """
    if not k.dtype == v.dtype == k_store.dtype == v_store.dtype:
        raise ValueError(f"keys in {k.dtype} and {v.dtype}, stores in {k_store.dtype} and {v_store.dtype}")
    packed = PackedSpans.of(keys.spans)
    _, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    narrow, paged = q.dtype == torch.bfloat16, keys.table is not None
    queries, key_block, warps = (QUERIES, KEYS, ATTEND_WARPS)
    if not narrow:
        queries, key_block, warps = FP32_QUERIES, FP32_KEYS, FP32_ATTEND_WARPS
    table = keys.table if keys.table is not None else packed.rows  # not read in a ring
    table_stride = table.stride(0) if paged else 0
    launch(
        attend_spans, (heads, packed.num_tiles * (TILE // queries)),
        q, k, v, k_store, v_store, table, out,
        packed.tile_span, packed.tile_begin, packed.tile_size, packed.offsets, packed.rows, packed.starts,
        position_stride(q), position_stride(k), position_stride(v), table_stride, keys.capacity or 0, keys.window,
        head_dim**-0.5,
        H=heads, P=head_dim, BLOCK_P=block_of(head_dim), TILE=TILE, QUERIES=queries, KEYS=key_block, PAGED=paged,
        WINDOWED=keys.window >= 0, NARROW=narrow, num_warps=warps,
    )  # fmt: skip
    keep(k, v, k_store, v_store, keys)
    return out


def keep(k: Tensor, v: Tensor, k_store: Tensor, v_store: Tensor, keys: Keys) -> None:
    """Keeps the spans' rotated keys and values where `keys` says; of a ring's position those that come last.

    k, v: [T, H, P], heads and channels of a position side by side; k_store, v_store: [slots, H, P] (updated in place).
    """
    packed = PackedSpans.of(keys.spans)
    paged = keys.table is not None
    table = keys.table if keys.table is not None else packed.rows
    width = k.shape[1] * k.shape[2]
    launch(
        keep_spans, (blocks(width, KEEP_CHANNELS), packed.total),
        k, v, k_store, v_store, table, packed.span_of, packed.time_of, packed.rows, packed.starts, packed.lengths,
        position_stride(k), position_stride(v), table.stride(0) if paged else 0, keys.capacity or 0,
        WIDTH=width, BLOCK=KEEP_CHANNELS, TILE=TILE, PAGED=paged, num_warps=KEEP_WARPS,
    )  # fmt: skip
