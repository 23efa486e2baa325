"""Who has which memory: rows, pages, and the snapshots that share pages with rows. Knows integers and byte strings;
what a row's state is, the arenas alone know.

Pages are given as positions are about to be run. When none is free, snapshots give way first; whether a row has to give
way after them is the scheduler's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from hnet_runtime.engine.snapshots import ChunkHistory, Pinned, Snapshot
from hnet_runtime.state.prefix import PrefixTree
from hnet_runtime.state.rows import PAGE, PagePool, RowPool, StagePages, pages_for

_ENDLESS = 1 << 62  # positions, where no stage keeps pages


class Saved(Protocol):
    """A row's own state, copied; `positions` of each stage."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def positions(self) -> tuple[int, ...]: ...


class Swapped(Protocol):
    """A row with its pages, in host memory."""

    @property
    def positions(self) -> tuple[int, ...]: ...


class Arenas(Protocol):
    """The tensors of all rows: `state.arenas.ModelState`."""

    def reset(self, rows: Sequence[int]) -> None: ...

    def save(self, row: int) -> Any: ...

    def load(self, row: int, saved: Any) -> None: ...

    def copy_page(self, stage: int, source: int, target: int) -> None: ...

    def swap_out(self, row: int) -> Any: ...

    def swap_in(self, row: int, swapped: Any) -> None: ...


class RowMemory:
    """Rows, pages and snapshots of one engine.

    pages: of every stage that keeps pages; cache_bytes: what snapshots of prefixes may take together, 0 for none.
    """

    def __init__(self, rows: RowPool, pages: Sequence[StagePages], arenas: Arenas, cache_bytes: int) -> None:
        self._rows, self._pages, self._arenas = rows, tuple(pages), arenas
        self._tree: PrefixTree[Snapshot] = PrefixTree(cache_bytes)
        self._pinned: list[Pinned] = []

    @property
    def num_rows(self) -> int:
        return self._rows.capacity

    @property
    def num_free_rows(self) -> int:
        return self._rows.num_free

    @property
    def caches(self) -> bool:
        return self._tree.budget_bytes > 0

    @property
    def cached_bytes(self) -> int:
        """What cached snapshots take, beside the pages they hold."""
        return self._tree.num_bytes

    @property
    def kv_in_use(self) -> float:
        """Share of the scarcest stage's pages that rows own, 0–1. Those of snapshots are free to be taken."""
        return max((pages.pool.num_owned / pages.pool.num_pages for pages in self._pages), default=0.0)

    @property
    def most_positions(self) -> int | None:
        """Positions that a row alone can have in its scarcest stage; None without pages."""
        return min((pages.pool.num_pages * PAGE for pages in self._pages), default=None)

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────

    def begin(self, snapshot: Snapshot | None, expected: Sequence[int] | None = None, spare: int = 0) -> int | None:
        """A row as new, or where `snapshot` was taken; None if pages are short.

        expected: positions of each stage that it will run soon, for which pages are to be free, and `spare` more.
        """
        if snapshot is not None:
            self._share(snapshot)  # so that it does not give way to itself
        try:
            if expected is not None and not self.has_room(expected, spare):
                return None
            return self._begin_new() if snapshot is None else self._begin_from(snapshot)
        finally:
            if snapshot is not None:
                self._release(snapshot)

    def _begin_new(self) -> int:
        row = self._rows.allocate()
        for pages in self._pages:
            pages.pool.grow(row, 0)
        self._arenas.reset([row])
        return row

    def _begin_from(self, snapshot: Snapshot) -> int | None:
        positions = snapshot.saved.positions
        if not all(self._free(each.pool, int(positions[each.stage] % PAGE != 0)) for each in self._pages):
            return None
        row = self._rows.allocate()
        self._arenas.load(row, snapshot.saved)
        for each, held in zip(self._pages, snapshot.pages, strict=True):
            copy = each.pool.adopt(row, held, positions[each.stage])
            if copy is not None:
                self._arenas.copy_page(each.stage, *copy)
        return row

    def leave(self, row: int) -> None:
        self._rows.free(row)
        for pages in self._pages:
            pages.pool.free(row)

    def swap_out(self, row: int) -> Swapped:
        """Copies a row, with what it waits with, to host memory, and frees it."""
        swapped: Swapped = self._arenas.swap_out(row)
        self.leave(row)
        return swapped

    def swap_in(self, swapped: Swapped) -> int | None:
        """A row on which all is as it was; None if the pages cannot be had."""
        if not all(self._free(each.pool, pages_for(swapped.positions[each.stage])) for each in self._pages):
            return None
        row = self._rows.allocate()
        for each in self._pages:
            each.pool.grow(row, swapped.positions[each.stage])
        self._arenas.swap_in(row, swapped)
        return row

    # ── pages ─────────────────────────────────────────────────────────────────────────────────────

    def lacking(self, rows: Sequence[int], first: int, last: int) -> list[int]:
        """Those of `rows` that lack a page for one position more in a stage of first…last."""
        index = np.array(rows, dtype=np.int64)
        lacks = np.zeros(len(index), dtype=np.bool_)
        for pages in self._pages:
            if first <= pages.stage <= last:
                lacks |= pages.pool.lacking(index, pages.positions[index])
        return index[lacks].tolist() if lacks.any() else []

    def slack(self, rows: Sequence[int]) -> int:
        """Positions more that each of `rows` has pages for in every stage."""
        if not self._pages:
            return _ENDLESS
        return min((each.pool.slack(row, int(each.positions[row])) for each in self._pages for row in rows), default=0)

    def grow(self, row: int, first: int, last: int, count: int) -> int:
        """Gives `row` pages for up to `count` positions more in each of the stages first…last; returns how many there
        is room for. Snapshots give way where pages are short."""
        wanted = [(each.pool, int(each.positions[row])) for each in self._pages if first <= each.stage <= last]
        for pool, positions in wanted:
            self._free(pool, min(pool.missing(row, positions + count), pool.num_pages - pool.num_owned))
        count = min([count, *(pool.capacity(row) - positions for pool, positions in wanted)])
        if count > 0:
            for pool, positions in wanted:
                pool.grow(row, positions + count)
        return max(count, 0)

    def trim(self, row: int) -> None:
        """Returns pages that `row` was given and did not write."""
        for pages in self._pages:
            pages.pool.trim(row, int(pages.positions[row]))

    def has_room(self, positions: Sequence[int], spare: int) -> bool:
        """Whether pages for so many positions of each stage, and `spare` ones more, are free. Snapshots give way."""
        return all(self._free(each.pool, pages_for(positions[each.stage]) + spare) for each in self._pages)

    def _free(self, pool: PagePool, wanted: int) -> bool:
        """Makes `wanted` pages free, if there are so many beside those of rows; else no snapshot gives way."""
        if pool.num_pages - pool.num_owned < wanted:
            return False
        while pool.num_free < wanted:
            if evicted := self._tree.evict():
                self._release(evicted[0])
            elif self._pinned:
                self._let_go(self._pinned[-1])
            else:
                return False
        return True

    # ── snapshots ─────────────────────────────────────────────────────────────────────────────────

    def find(self, salt: str, prompt: bytes) -> Snapshot | None:
        """The cached snapshot after the most bytes of `prompt`, be it all of them."""
        match = self._tree.lookup(salt, prompt)
        return None if match is None else match.payload

    def shared(self, salt: str, prompt: bytes) -> int:
        """How many leading bytes of `prompt` cached prefixes have in common with it."""
        return self._tree.shared(salt, prompt)

    def keep(
        self, row: int, salt: str, data: bytes, chunks: ChunkHistory, logits: Any, users: int = 0
    ) -> Pinned | None:
        """Snapshots a row at rest after `data` into the cache, and for `users` who wait for it."""
        saved: Saved = self._arenas.save(row)
        assert saved.positions[0] == len(data), "a snapshot of other bytes than were fed"
        pages = tuple(each.pool.hold(row, saved.positions[each.stage]) for each in self._pages)
        # A logit is four bytes.
        num_bytes = saved.num_bytes + chunks.num_bytes + 4 * len(logits)
        snapshot = Snapshot(len(data), saved, pages, chunks, logits, num_bytes)
        pinned = None
        if users:
            pinned = Pinned(replace(snapshot), users)
            self._share(snapshot)
            self._pinned.append(pinned)
        for given_up in self._tree.insert(salt, data, snapshot, num_bytes):
            self._release(given_up)
        return pinned

    def unpin(self, pinned: Pinned) -> None:
        """One of its users needs it no longer."""
        pinned.users -= 1
        if not pinned.users and pinned.snapshot is not None:
            self._let_go(pinned)

    def clear(self) -> None:
        """Empties the cache."""
        for snapshot in self._tree.clear():
            self._release(snapshot)

    def check(self, live: Sequence[int]) -> None:
        """Conservation: free + cached + owned = total, of rows and pages. Raises AssertionError."""
        self._rows.check()
        assert self._rows.num_live == len(live), "rows leaked"
        self._tree.check()
        snapshots = [*self._tree.payloads(), *(each.snapshot for each in self._pinned if each.snapshot is not None)]
        for index, pages in enumerate(self._pages):
            pages.pool.check(live, [snapshot.pages[index] for snapshot in snapshots])

    def _let_go(self, pinned: Pinned) -> None:
        assert pinned.snapshot is not None
        self._release(pinned.snapshot)
        pinned.snapshot = None
        self._pinned.remove(pinned)

    def _share(self, snapshot: Snapshot) -> None:
        for each, held in zip(self._pages, snapshot.pages, strict=True):
            each.pool.share(held)

    def _release(self, snapshot: Snapshot) -> None:
        for each, held in zip(self._pages, snapshot.pages, strict=True):
            each.pool.drop(held)
