"""Causal attention over keys kept by stage position, summed over fixed blocks of positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

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
