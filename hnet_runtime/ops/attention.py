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

    For every span a run of L positions that begins at a block border at or before the first
    key its first query sees, and reaches its last position. `window` is the number of positions before
    a query that it sees; −1 sees all. `capacity` is how many positions of a row the store keeps (ring), or
    None.
    """

    def __init__(self, spans: Spans, window: int, slots_of: SlotsOf, capacity: int | None) -> None:
        self.spans, self.window = spans, window
        oldest = np.maximum(spans.starts - window, 0) if window >= 0 else np.zeros_like(spans.starts)
        base = oldest - oldest % BLOCK
        newest = spans.starts + spans.lengths - 1
        self.blocks = int(((newest - base) // BLOCK + 1).max())
        positions = base[:, None] + np.arange(self.blocks * BLOCK)[None, :]  # [R, L]
        self._positions = positions
        self._kept = (positions >= oldest[:, None]) & (positions <= newest[:, None])
        inside = np.minimum(positions, newest[:, None])
        self.gather = spans.tensor(slots_of(spans.rows[:, None], inside).reshape(-1))
        # Where the spans' own keys stand in the grid, and which of them are worth keeping.
        place = spans.position_of - base[spans.span_of]
        self.own = spans.tensor(spans.span_of * positions.shape[1] + place)
        keep = np.flatnonzero(spans.position_of > newest[spans.span_of] - capacity) if capacity else None
        self.write_from = None if keep is None or len(keep) == spans.total else spans.tensor(keep)
        written = slice(None) if keep is None else keep
        self.write = spans.tensor(
            slots_of(spans.rows[spans.span_of][written][:, None], spans.position_of[written][:, None])[:, 0]
        )

    @cached_property
    def absent(self) -> Tensor:
        """[R, L, 1, 1] True where the grid holds no key of the row: another row's leftovers, perhaps not finite."""
        return self.spans.tensor(~self._kept)[:, :, None, None]

    def hidden(self, begin: int, end: int) -> Tensor:
        """[R, end − begin, 1, L] True where the query at that time of its span must not see the key."""
        query = (self.spans.starts[:, None] + np.arange(begin, end)[None, :])[:, :, None]
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

    per_time = keys.numel()
    at_once = max(1, _CHUNK_FLOATS // per_time)
    parts = [
        _attend_block(queries[:, begin : begin + at_once], keys, values, grid, begin)
        for begin in range(0, spans.longest, at_once)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if not spans.is_step:
        out = out[spans.tensor(spans.span_of), spans.tensor(spans.time_of)]
    return out.reshape(spans.total, heads, head_dim).to(q.dtype)


def _gathered(new: Tensor, store: Tensor, grid: KeyGrid) -> Tensor:
    """[R, L, H, P] fp32: kept keys, with the spans' own laid over; the store then takes those."""
    found = store.index_select(0, grid.gather)
    found.index_copy_(0, grid.own, new)
    store.index_copy_(0, grid.write, new if grid.write_from is None else new[grid.write_from])
    return found.view(len(grid.spans), -1, *new.shape[1:]).float()


def _attend_block(queries: Tensor, keys: Tensor, values: Tensor, grid: KeyGrid, begin: int) -> Tensor:
    """Queries [R, t, H, P] at times begin… of their spans against the grid → [R, t, H, P]."""
    spans_count, times, heads, head_dim = queries.shape
    scores = (queries.unsqueeze(2) * keys.unsqueeze(1)).sum(-1)  # [R, t, L, H]
    scores = scores.transpose(2, 3).masked_fill(grid.hidden(begin, begin + times), float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))  # [R, t, H, L]
    weights = weights.view(spans_count, times, heads, grid.blocks, BLOCK)
    totals = weights.sum(-1)  # [R, t, H, blocks]
    spread = weights.permute(0, 1, 3, 4, 2).unsqueeze(-1)  # [R, t, blocks, BLOCK, H, 1]
    mixed = (spread * values.view(spans_count, 1, grid.blocks, BLOCK, heads, head_dim)).sum(3)
    total, out = totals[..., 0], mixed[:, :, 0]
    for block in range(1, grid.blocks):
        total = total + totals[..., block]
        out = out + mixed[:, :, block]
    return out / total.unsqueeze(-1)
