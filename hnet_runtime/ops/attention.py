"""Causal attention over keys kept by stage position, summed over fixed blocks of positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.ops.rotary import rotary_table, rotate
from hnet_runtime.ops.spans import Ints, Spans

BLOCK = 64
"""Keys of one partial sum. Blocks begin at absolute multiples of it, so that a query adds up its
keys in one order whatever span, page or ring it finds them in."""

_CHUNK_FLOATS = 1 << 22  # products of queries and keys held at once

SlotsOf = Callable[[Ints, Ints], Ints]
"""(rows [R, 1], stage positions [R, L]) → [R, L] where those keys are kept: a page or a ring's place.
Any valid slot may stand for a position that is not kept; it is masked."""


class KeyGrid:
    """Which keys the queries of `spans` see and where they are kept: the same for all layers of a stage.

    For every span the blocks from the one with the oldest key its first query sees to the one with its own last
    position. They are packed like Spans pack positions: the n-th blocks of all spans lie together, spans with
    most blocks first, so that sums over blocks walk contiguous slices and a short row pays nothing for a long one.

    window: positions before a query that it sees; −1 sees all. capacity: how many positions of a row the store
    keeps (ring), or None (pages).
    """

    def __init__(self, spans: Spans, window: int, slots_of: SlotsOf, capacity: int | None) -> None:
        self.spans, self.window = spans, window
        oldest = np.maximum(spans.starts - window, 0) if window >= 0 else np.zeros_like(spans.starts)
        newest = spans.starts + spans.lengths - 1
        first_block = oldest // BLOCK
        self.blocks, order = Spans.of(spans.rows, first_block, newest // BLOCK - first_block + 1, spans.device)
        owner = order[self.blocks.span_of]  # [N] the span each packed block belongs to
        self._owner = owner
        self._positions = self.blocks.position_of[:, None] * BLOCK + np.arange(BLOCK)[None, :]  # [N, BLOCK]
        self._kept = (self._positions >= oldest[owner, None]) & (self._positions <= newest[owner, None])
        inside = np.minimum(self._positions, newest[owner, None])
        self.gather = spans.tensor(slots_of(spans.rows[owner, None], inside).reshape(-1))
        self.owner = spans.tensor(owner)
        self.place_of = spans.tensor(self.blocks.span_of)  # [N] place of each block's span in the blocks' order
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.back = spans.tensor(place)  # [R] from the blocks' order to the spans'
        # Where the spans' own keys stand among the blocks, and which of them are worth keeping.
        span, position = spans.span_of, spans.position_of
        block = self.blocks.offsets[position // BLOCK - first_block[span]] + place[span]
        self.own = spans.tensor(block * BLOCK + position % BLOCK)
        keep = np.flatnonzero(position > newest[span] - capacity) if capacity else np.arange(spans.total)
        self.write_from = None if len(keep) == spans.total else spans.tensor(keep)
        self.write = spans.tensor(slots_of(spans.rows[span[keep]][:, None], position[keep, None])[:, 0])

    @cached_property
    def absent(self) -> Tensor:
        """[N, BLOCK, 1, 1] True where no key of the row stands: another row's leftovers, perhaps not finite."""
        return self.spans.tensor(~self._kept)[:, :, None, None]

    def hidden(self, begin: int, end: int) -> Tensor:
        """[N, end − begin, 1, BLOCK] True where the query at that time of its span must not see the key."""
        query = (self.spans.starts[self._owner, None] + np.arange(begin, end)[None, :])[:, :, None]
        key = self._positions[:, None, :]
        hidden = key > query
        if self.window >= 0:
            hidden |= key < query - self.window
        return self.spans.tensor(hidden)[:, :, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, k_store: Tensor, v_store: Tensor, grid: KeyGrid) -> Tensor:
    """softmax(q Kᵀ / √P) V over the keys each query sees; keeps k and v in the stores.

    q, k, v: [T, H, P] packed, rotated; k_store, v_store: [slots, H, P] (updated in place) → [T, H, P]
    in q's dtype. Products and sums are in fp32; the softmax takes the exact maximum first, then adds block by
    block in order of position.
    """
    spans = grid.spans
    keys, values = _gathered(k, k_store, grid), _gathered(v, v_store, grid)
    values.masked_fill_(grid.absent, 0.0)
    heads, head_dim = q.shape[1:]
    padded = q if spans.is_step else q[spans.padded_index.reshape(-1)]
    queries = (padded.float() * head_dim**-0.5).view(len(spans), spans.longest, heads, head_dim)

    at_once = max(1, _CHUNK_FLOATS // keys.numel())
    parts = [
        _attend_times(queries[:, begin : begin + at_once], keys, values, grid, begin)
        for begin in range(0, spans.longest, at_once)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if not spans.is_step:
        out = out[spans.tensor(spans.span_of), spans.tensor(spans.time_of)]
    return out.reshape(spans.total, heads, head_dim).to(q.dtype)


def _gathered(new: Tensor, store: Tensor, grid: KeyGrid) -> Tensor:
    """[N, BLOCK, H, P] fp32: kept keys, with the spans' own laid over; the store then takes those."""
    found = store.index_select(0, grid.gather)
    found.index_copy_(0, grid.own, new)
    store.index_copy_(0, grid.write, new if grid.write_from is None else new[grid.write_from])
    return found.view(-1, BLOCK, *new.shape[1:]).float()


def _attend_times(queries: Tensor, keys: Tensor, values: Tensor, grid: KeyGrid, begin: int) -> Tensor:
    """Queries [R, t, H, P] at times begin… of their spans against the blocks → [R, t, H, P]."""
    times = queries.shape[1]
    # [N, t, BLOCK, H], then the block's axis last
    scores = (queries[grid.owner].unsqueeze(2) * keys.unsqueeze(1)).sum(-1).transpose(2, 3)
    scores = scores.masked_fill(grid.hidden(begin, begin + times), float("-inf"))
    largest = _over_blocks(scores.amax(-1), grid, torch.maximum)  # [R, t, H], in the blocks' order
    weights = torch.exp(scores - largest[grid.place_of].unsqueeze(-1))  # [N, t, H, BLOCK]
    total = _over_blocks(weights.sum(-1), grid, torch.add)
    mixed = (weights.transpose(2, 3).unsqueeze(-1) * values.unsqueeze(1)).sum(2)  # [N, t, H, P]
    return (_over_blocks(mixed, grid, torch.add) / total.unsqueeze(-1))[grid.back]


def _over_blocks(parts: Tensor, grid: KeyGrid, combine: Callable[..., Tensor]) -> Tensor:
    """Combines [N, …] block by block in order of position → [R, …] in the blocks' order."""
    offsets, counts = grid.blocks.offsets, grid.blocks.counts
    result = parts[: counts[0]].clone()
    for block in range(1, grid.blocks.longest):
        here = result[: counts[block]]
        combine(here, parts[offsets[block] : offsets[block + 1]], out=here)
    return result


def rotate_and_keep(
    qkv: Tensor, positions: Tensor, slots: Tensor, k_store: Tensor, v_store: Tensor, rotary_dim: int
) -> Tensor:
    """Turns one position's query and key of each row and keeps its key and value.

    qkv: [B, 3, H, P] in the model's dtype, positions: [B] int64 of the stage, slots: [B] int64 where key and value go,
    k_store, v_store: [slots, H, P] (updated in place), rotary_dim: channels that turn, 0 for none → q: [B, H, P].
    """
    q, k, v = qkv.unbind(1)
    if rotary_dim:
        table = rotary_table(positions, rotary_dim)
        q, k = rotate(q, table), rotate(k, table)
    k_store.index_copy_(0, slots, k.to(k_store.dtype))
    v_store.index_copy_(0, slots, v.to(v_store.dtype))
    return q.contiguous()


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
    """`attend` of one query of each row, whose own key is kept already, with shapes that no data changes.

    q: [B, H, P] rotated, k_store, v_store: [slots, H, P], rows, positions: [B] int64 the arena row and the stage
    position of each query, window: positions before it that it sees (−1: all), max_positions: more than any position.
    The keys of a row lie in the pages of its `table` [rows, pages] int64, or, where that is None, in a ring of
    `capacity` places → [B, H, P] in q's dtype. Blocks that a query does not see add exact zeros.
    """
    count = len(q)
    heads, head_dim = q.shape[1:]
    num_blocks = blocks_seen(window, max_positions)
    oldest = (positions - window).clamp(min=0) if window >= 0 else torch.zeros_like(positions)
    first = torch.div(oldest, BLOCK, rounding_mode="floor") * BLOCK
    at = first[:, None] + torch.arange(num_blocks * BLOCK, device=q.device)  # [B, n · BLOCK] positions of keys
    hidden = ((at < oldest[:, None]) | (at > positions[:, None])).view(-1, 1, 1, BLOCK)  # [B · n, 1, 1, BLOCK]
    slots = key_slots(rows, torch.minimum(at, positions[:, None]), table, capacity).view(-1)
    keys = k_store.index_select(0, slots).view(-1, BLOCK, heads, head_dim).float()
    values = v_store.index_select(0, slots).view(-1, BLOCK, heads, head_dim).float()
    values.masked_fill_(hidden.view(-1, BLOCK, 1, 1), 0.0)  # another row's leftovers, perhaps not finite

    # The order of axes is that of `attend`: in another one a library adds up in another order.
    queries = (q.float() * head_dim**-0.5)[:, None].expand(-1, num_blocks, -1, -1).reshape(-1, 1, 1, heads, head_dim)
    scores = (queries * keys.unsqueeze(1)).sum(-1).transpose(2, 3).masked_fill(hidden, float("-inf"))
    largest = scores.amax(-1).view(count, num_blocks, heads).amax(1)
    largest = largest[:, None].expand(-1, num_blocks, -1).reshape(-1, 1, heads, 1)
    weights = torch.exp(scores - largest)  # [B · n, 1, H, BLOCK]
    total = _in_order(weights.sum(-1).view(count, num_blocks, heads))
    mixed = (weights.transpose(2, 3).unsqueeze(-1) * values.unsqueeze(1)).sum(2)
    out = _in_order(mixed.view(count, num_blocks, heads, head_dim)) / total.unsqueeze(-1)
    return out.to(q.dtype)


def blocks_seen(window: int, max_positions: int) -> int:
    """Blocks in which a query sees keys, at most."""
    every = -(-max_positions // BLOCK)
    return every if window < 0 else min(every, -(-window // BLOCK) + 1)


def key_slots(rows: Tensor, positions: Tensor, table: Tensor | None, capacity: int | None) -> Tensor:
    """Where a row's positions are kept: in its pages (of BLOCK positions each), or in its ring.

    rows: [B], positions: [B, L], table: [rows, pages] or None, all int64; capacity: places of a ring → [B, L].
    """
    if table is None:
        assert capacity is not None
        return rows[:, None] * capacity + positions % capacity
    page = torch.div(positions, BLOCK, rounding_mode="floor")
    return table.index_select(0, rows).gather(1, page) * BLOCK + positions % BLOCK


def _in_order(parts: Tensor) -> Tensor:
    """[B, n, …] → [B, …], block after block."""
    result = parts[:, 0].clone()
    for block in range(1, parts.shape[1]):
        result.add_(parts[:, block])
    return result
