"""Pieces of several rows' sequences at one stage, packed so that time runs outermost.

Knows rows, positions and places in a packed tensor; nothing of what stands there. A decoding
step is the case where every span has length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Spans:
    """R spans, one a row, longest first, packed time-major into T positions.

    Position t of span i stands at `offsets[t] + i`: at each time the spans still running are
    the first `counts[t]`, so a recurrence walks contiguous slices.

    rows: [R] the arena row of each span.
    starts: [R] the stage position each span begins at (positions that the row has run already).
    lengths: [R] positions of each span, descending, at least 1.
    """

    def __init__(self, rows: Ints, starts: Ints, lengths: Ints, device: torch.device) -> None:
        self.rows, self.starts, self.lengths = rows, starts, lengths
        self.device = device
        self.total = int(lengths.sum())
        self.longest = int(lengths[0]) if len(lengths) else 0
        self.is_step = self.longest <= 1

    @classmethod
    def of(
        cls,
        rows: Sequence[int] | Ints,
        starts: Sequence[int] | Ints,
        lengths: Sequence[int] | Ints,
        device: torch.device,
    ) -> tuple[Spans, Ints]:
        """Spans in packed order, and the order taken: span i here is span order[i] of the arguments."""
        lengths = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        rows, starts = np.asarray(rows, dtype=np.int64), np.asarray(starts, dtype=np.int64)
        return cls(rows[order], starts[order], lengths[order], device), order

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def counts(self) -> Ints:
        """[longest] spans running at each time."""
        if self.is_step:
            return np.full(self.longest, len(self), dtype=np.int64)
        return np.searchsorted(-self.lengths, -np.arange(self.longest), side="left").astype(np.int64)

    @cached_property
    def offsets(self) -> Ints:
        """[longest + 1] where each time's positions begin in the packed tensor."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @cached_property
    def span_of(self) -> Ints:
        """[T] the span each packed position belongs to."""
        return np.arange(self.total) - np.repeat(self.offsets[:-1], self.counts)

    @cached_property
    def time_of(self) -> Ints:
        """[T] each packed position's time within its span."""
        return np.repeat(np.arange(self.longest), self.counts)

    @cached_property
    def row_index(self) -> Tensor:
        """[R] rows as an index into arenas."""
        return self.tensor(self.rows)

    def consecutive(self, part: slice) -> slice | None:
        """The arena rows of these spans as a slice, where they are consecutive, else None."""
        first = int(self.rows[part.start])
        run = slice(first, first + part.stop - part.start)
        return run if np.array_equal(self.rows[part], np.arange(run.start, run.stop)) else None

    @cached_property
    def position_of(self) -> Ints:
        """[T] absolute stage position of each packed position."""
        return self.starts[self.span_of] + self.time_of

    @cached_property
    def last(self) -> Ints:
        """[R] packed place of each span's last position."""
        return self.offsets[self.lengths - 1] + np.arange(len(self))

    @cached_property
    def padded_index(self) -> Tensor:
        """[R, longest] packed place of (span, time); places past a span's end point at 0."""
        times = np.arange(self.longest)
        index = self.offsets[:-1][None, :] + np.arange(len(self))[:, None]
        return self.tensor(np.where(times[None, :] < self.lengths[:, None], index, 0))

    def history_index(self, depth: int) -> tuple[Tensor, Tensor]:
        """Where to find each position's last `depth` predecessors and itself.

        The source is [R · depth + T]: each row's `depth` carried positions, oldest first, then
        the packed ones. Returns ([T, depth + 1], oldest first, and [R, depth] the positions to
        carry on).
        """
        return (
            self.tensor(self._history(self.span_of, self.time_of, depth + 1, depth)),
            self.tensor(self._history(np.arange(len(self)), self.lengths - 1, depth, depth)),
        )

    def _history(self, span: Ints, time: Ints, width: int, depth: int) -> Ints:
        times = time[:, None] - np.arange(width - 1, -1, -1)[None, :]
        spans = span[:, None]
        packed = len(self) * depth + self.offsets[np.maximum(times, 0)] + spans
        return np.where(times >= 0, packed, spans * depth + depth + times)

    @cached_property
    def predecessor(self) -> Tensor:
        """[T] place of each position's predecessor in [R carried ones, then T packed ones]."""
        if self.is_step:
            return torch.arange(len(self), device=self.device)
        return self.history_index(1)[0][:, 0].contiguous()

    def select(self, chosen: NDArray[np.bool_], starts: Ints) -> tuple[Spans, Ints, Ints]:
        """The spans of the next stage, made of the chosen positions.

        chosen: [T], starts: [R] positions of the next stage that each row has run already.
        Returns the spans, their packed positions' places here [T'], and for each position here
        how to find the newest chosen one of its row up to it: [T], a place in [R carried ones,
        then T' packed ones].
        """
        if self.is_step:
            places = np.flatnonzero(chosen)
            newest = np.arange(len(self))
            newest[places] = len(self) + np.arange(len(places))
            ones = np.ones(len(places), dtype=np.int64)
            return Spans(self.rows[places], starts[places], ones, self.device), places, newest
        span, rank = self.span_of, self._rank(chosen)
        lengths = np.bincount(span[chosen], minlength=len(self))
        inner, order = Spans.of(self.rows, starts, lengths, self.device)
        kept = lengths[order] > 0
        inner = Spans(inner.rows[kept], inner.starts[kept], inner.lengths[kept], self.device)
        slot = np.empty(len(self), dtype=np.int64)  # span here → span there
        slot[order] = np.arange(len(self))
        packed = np.where(rank > 0, len(self) + inner.offsets[np.maximum(rank - 1, 0)] + slot[span], span)
        places = np.empty(inner.total, dtype=np.int64)
        places[packed[chosen] - len(self)] = np.flatnonzero(chosen)
        return inner, places, packed

    def _rank(self, chosen: NDArray[np.bool_]) -> Ints:
        """[T] how many positions of the same span, up to this one, are chosen."""
        grid = np.zeros((len(self), self.longest), dtype=np.int64)
        grid[self.span_of, self.time_of] = chosen
        return np.cumsum(grid, axis=1)[self.span_of, self.time_of]

    def tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)
