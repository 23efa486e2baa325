"""Mamba-2's recurrence over spans, tile by tile: products inside a tile, a state carried from tile to tile.

The dual form of ops/ssm.py. With L_t the sum of dt·A over a tile's positions up to t, and S the state before it:

    y_t  = Σ_{u ≤ t} (C_t·B_u) exp(L_t − L_u) dt_u x_u + exp(L_t) S C_t + D x_t
    S'   = exp(L_end) S + Σ_u exp(L_end − L_u) dt_u x_u ⊗ B_u

Sums run in fp32, the L in fp64: their differences, which are exponents, lose nothing to a strong decay earlier in the
tile. S stays fp32 from tile to tile and in the arena, and y is made from it unrounded. A tile's numbers depend on its
own span alone.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton.launching import blocks, launch
from hnet_runtime.ops.triton.packed_spans import TILE, PackedSpans, position_stride
from hnet_runtime.ops.triton.products import block_of, product, wide_product

SCRATCH_BYTES = 256 << 20
"""Most memory for the states between tiles. More tiles than fit run in turns, with the same bits: what is carried from
turn to turn is what is carried from tile to tile."""

PRODUCTS_WARPS, STATES_WARPS, PASS_WARPS, OUTPUT_WARPS = 4, 8, 4, 8
FP32_SLICE = 32  # of N, and of P in the output, at once where operands are fp32, which takes more registers
PASS_BLOCK = 1024  # of a state's P·N numbers in one program that passes it on


@triton.jit
def _places(offsets_ptr, span, begin, size, TILE: tl.constexpr):
    """Packed places of a tile's positions, 0 past its end, and which of them are its own."""
    index = tl.arange(0, TILE)
    own = index < size
    places = tl.load(offsets_ptr + begin + index, mask=own, other=0) + span
    return tl.where(own, places, 0), own


@triton.jit
def _decays(dt_ptr, a_ptr, places, own, head, dt_stride):
    """dt of a tile's positions, 0 past its end, and L in fp64 with its value at the end."""
    dt = tl.load(dt_ptr + places * dt_stride + head, mask=own, other=0.0).to(tl.float32)
    steps = (dt * tl.load(a_ptr + head)).to(tl.float64)
    return dt, tl.cumsum(steps, 0), tl.sum(steps, 0)


@triton.jit(do_not_specialize=["first"])
def tile_products(
    c_ptr,  # [T, N]
    b_ptr,  # [T, N]
    products_ptr,  # [tiles of this turn, TILE, TILE] fp32
    tile_span_ptr,
    tile_begin_ptr,
    tile_size_ptr,
    offsets_ptr,
    first,  # tile of this turn
    c_stride,
    b_stride,
    N: tl.constexpr,
    SLICE: tl.constexpr,
    TILE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """C_t · B_u of every two positions of a tile, the same for all heads."""
    here = tl.program_id(0).to(tl.int64)
    tile = first + here
    size = tl.load(tile_size_ptr + tile)
    places, own = _places(offsets_ptr, tl.load(tile_span_ptr + tile), tl.load(tile_begin_ptr + tile), size, TILE)
    products = tl.zeros((TILE, TILE), dtype=tl.float32)
    for at in range(0, N, SLICE):
        states = at + tl.arange(0, SLICE)
        mask = own[:, None] & (states < N)[None, :]
        c = tl.load(c_ptr + places[:, None] * c_stride + states[None, :], mask=mask, other=0.0)
        b = tl.load(b_ptr + places[:, None] * b_stride + states[None, :], mask=mask, other=0.0)
        products += product(c, tl.trans(b), NARROW)
    index = tl.arange(0, TILE)
    tl.store(products_ptr + here * TILE * TILE + index[:, None] * TILE + index[None, :], products)


@triton.jit(do_not_specialize=["first"])
def tile_states(
    x_ptr,  # [T, H, P]
    dt_ptr,  # [T, H]
    a_ptr,  # [H]
    b_ptr,  # [T, N]
    states_ptr,  # [tiles of this turn, H, P, N] fp32
    decay_ptr,  # [tiles of this turn, H] fp32
    tile_span_ptr,
    tile_begin_ptr,
    tile_size_ptr,
    offsets_ptr,
    first,
    x_stride,
    dt_stride,
    b_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
    TILE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """What a tile adds to the state by its end, and what is left by then of the state before it."""
    head = tl.program_id(0)
    here = tl.program_id(1).to(tl.int64)
    tile = first + here
    size = tl.load(tile_size_ptr + tile)
    places, own = _places(offsets_ptr, tl.load(tile_span_ptr + tile), tl.load(tile_begin_ptr + tile), size, TILE)
    channels, states = tl.arange(0, BLOCK_P), tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    dt, total, end = _decays(dt_ptr, a_ptr, places, own, head, dt_stride)
    weight = tl.exp((end - total).to(tl.float32)) * dt
    x = tl.load(
        x_ptr + places[:, None] * x_stride + head * P + channels[None, :],
        mask=own[:, None] & (channels < P)[None, :],
        other=0.0,
    ).to(tl.float32)
    b = tl.load(
        b_ptr + places[:, None] * b_stride + states[None, :], mask=own[:, None] & (states < N)[None, :], other=0.0
    )
    added = wide_product(tl.trans(x * weight[:, None]), b, NARROW)  # [P, N]
    out = states_ptr + (here * H + head) * P * N + channels[:, None] * N + states[None, :]
    tl.store(out, added, mask=(channels < P)[:, None] & (states < N)[None, :])
    if tl.program_id(2) == 0:
        tl.store(decay_ptr + here * H + head, tl.exp(end.to(tl.float32)))


@triton.jit(do_not_specialize=["first", "last"])
def pass_states(
    states_ptr,  # [tiles of this turn, H, P, N] fp32: added by each tile → the state before it
    decay_ptr,  # [tiles of this turn, H] fp32
    state_ptr,  # [rows, H, P, N] fp32
    rows_ptr,
    first_tile_ptr,
    first,
    last,  # one past the tiles of this turn
    H: tl.constexpr,
    SIZE: tl.constexpr,  # P · N
    BLOCK: tl.constexpr,
):
    """Walks a span's tiles in order, from its row's state and back to it."""
    span, head, block = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    begin = tl.maximum(tl.load(first_tile_ptr + span), first) - first
    end = tl.minimum(tl.load(first_tile_ptr + span + 1), last) - first
    if begin < end:
        index = block * BLOCK + tl.arange(0, BLOCK)
        mask = index < SIZE
        own = state_ptr + (tl.load(rows_ptr + span) * H + head) * SIZE + index
        carried = tl.load(own, mask=mask, other=0.0)
        pointer = states_ptr + (begin * H + head) * SIZE + index
        added = tl.load(pointer, mask=mask, other=0.0)
        for tile in range(begin, end):
            # The next tile's is under way before this one's place is written.
            following = pointer + H * SIZE
            ahead = tl.load(following, mask=mask & (tile + 1 < end), other=0.0)
            decay = tl.load(decay_ptr + tile * H + head)
            tl.store(pointer, carried, mask=mask)
            carried = carried * decay + added
            added, pointer = ahead, following
        tl.store(own, carried, mask=mask)


@triton.jit(do_not_specialize=["first"])
def tile_output(
    products_ptr,  # [tiles of this turn, TILE, TILE] fp32
    states_ptr,  # [tiles of this turn, H, P, N] fp32, before each tile
    x_ptr,
    dt_ptr,
    a_ptr,
    c_ptr,
    d_ptr,  # [H]
    y_ptr,  # [T, H, P]
    tile_span_ptr,
    tile_begin_ptr,
    tile_size_ptr,
    offsets_ptr,
    first,
    x_stride,
    dt_stride,
    c_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
    TILE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """y of a tile's positions, of one head."""
    head = tl.program_id(0)
    here = tl.program_id(1).to(tl.int64)
    tile = first + here
    size = tl.load(tile_size_ptr + tile)
    places, own = _places(offsets_ptr, tl.load(tile_span_ptr + tile), tl.load(tile_begin_ptr + tile), size, TILE)
    index, channels = tl.arange(0, TILE), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    dt, total, _ = _decays(dt_ptr, a_ptr, places, own, head, dt_stride)

    # From the state before the tile: C Sᵀ, as S Cᵀ turned over, because S is the wide one.
    turned = tl.zeros((BLOCK_P, TILE), dtype=tl.float32)
    for at in range(0, N, SLICE):
        states = at + tl.arange(0, SLICE)
        before = tl.load(
            states_ptr + (here * H + head) * P * N + channels[:, None] * N + states[None, :],
            mask=(channels < P)[:, None] & (states < N)[None, :],
            other=0.0,
        )
        c = tl.load(
            c_ptr + places[:, None] * c_stride + states[None, :], mask=own[:, None] & (states < N)[None, :], other=0.0
        )
        turned += wide_product(before, tl.trans(c), NARROW)
    y = tl.trans(turned) * tl.exp(total.to(tl.float32))[:, None]

    # From the tile's own positions. L as two fp32 numbers: the difference of the high parts is off by less than the
    # low parts know.
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(index[:, None] >= index[None, :], between, float("-inf")))
    products = tl.load(products_ptr + here * TILE * TILE + index[:, None] * TILE + index[None, :])
    channel_mask = own[:, None] & (channels < P)[None, :]
    x = tl.load(x_ptr + places[:, None] * x_stride + head * P + channels[None, :], mask=channel_mask, other=0.0)
    y += wide_product(products * decay * dt[None, :], x, NARROW)
    y += tl.load(d_ptr + head) * x.to(tl.float32)
    out = y_ptr + (places[:, None] * H + head) * P + channels[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=channel_mask)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    spans: Spans,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """ops.ssm.selective_scan in tiles of 64 positions: y of the spans, their rows' states advanced in place.

    x: [T, H, P], b, c: [T, N], fp32 or bf16, the channels of a position side by side (positions need not be);
    dt: [T, H] fp32 (after softplus); a, d: [H] fp32; state: [rows, H, P, N] fp32 → y: [T, H, P] in `out_dtype`. bf16
    inputs are multiplied on tensor cores, without loss. Raises ValueError where channels are not side by side.
    """
    total, heads, channels = x.shape
    num_states = b.shape[-1]
    packed = PackedSpans.of(spans)
    y = torch.empty(total, heads, channels, dtype=out_dtype, device=x.device)
    x_stride, dt_stride, b_stride, c_stride = (position_stride(each) for each in (x, dt, b, c))
    turn = min(packed.num_tiles, max(1, SCRATCH_BYTES // (4 * heads * channels * num_states)))
    states, decay, products = (
        torch.empty(turn, *shape, dtype=torch.float32, device=x.device)
        for shape in ((heads, channels, num_states), (heads,), (TILE, TILE))
    )
    tiles = (packed.tile_span, packed.tile_begin, packed.tile_size, packed.offsets)
    narrow = all(each.dtype == torch.bfloat16 for each in (x, b, c))
    at_once = block_of(num_states) if narrow else min(block_of(num_states), FP32_SLICE)
    of_states: dict[str, Any] = {"N": num_states, "SLICE": at_once, "TILE": TILE, "NARROW": narrow}
    of_heads = {"H": heads, "P": channels, "BLOCK_P": block_of(channels), **of_states}
    of_output = of_heads if narrow else of_heads | {"BLOCK_P": min(block_of(channels), FP32_SLICE)}
    size = channels * num_states
    for first in range(0, packed.num_tiles, turn):
        last = min(first + turn, packed.num_tiles)
        launch(
            tile_products, (last - first,),
            c, b, products, *tiles, first, c_stride, b_stride,
            num_warps=PRODUCTS_WARPS, **of_states,
        )  # fmt: skip
        launch(
            tile_states, (heads, last - first, blocks(num_states, at_once)),
            x, dt, a, b, states, decay, *tiles, first, x_stride, dt_stride, b_stride,
            num_warps=STATES_WARPS, **of_heads,
        )  # fmt: skip
        launch(
            pass_states, (blocks(size, PASS_BLOCK), heads, len(packed)),
            states, decay, state, packed.rows, packed.first_tile, first, last,
            num_warps=PASS_WARPS, H=heads, SIZE=size, BLOCK=PASS_BLOCK,
        )  # fmt: skip
        launch(
            tile_output, (heads, last - first, blocks(channels, of_output["BLOCK_P"])),
            products, states, x, dt, a, c, d, y, *tiles, first, x_stride, dt_stride, c_stride,
            num_warps=OUTPUT_WARPS, **of_output,
        )  # fmt: skip
    return y
