"""Prompts seen before: a radix tree over bytes whose nodes may carry a snapshot. Knows no tensors, rows or pages: a
snapshot is an opaque payload of a stated size, and whoever gets one back from the tree releases what it holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Match(Generic[Payload]):
    """A snapshot taken after the first `length` bytes of what was looked up."""

    length: int
    payload: Payload


@dataclass(slots=True, eq=False)
class _Snapshot(Generic[Payload]):
    payload: Payload
    num_bytes: int
    saved: int  # bytes between the nearest snapshot above, or the root, and this one
    clock: float = 0.0  # the tree's, when this was last touched
    touched: int = 0  # how many touches had been when this was

    @property
    def value(self) -> float:
        return self.clock + self.saved / self.num_bytes


@dataclass(slots=True, eq=False)
class _Node(Generic[Payload]):
    salt: str
    edge: bytes  # from the parent's end to this one's; empty at a root
    end: int  # bytes from the root
    parent: _Node[Payload] | None
    children: dict[int, _Node[Payload]] = field(default_factory=dict)  # by the first byte of their edges
    snapshot: _Snapshot[Payload] | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.num_bytes


class PrefixTree(Generic[Payload]):
    """Snapshots of all salts under one budget of bytes. The keys' own bytes are not counted.

    Nothing of one salt is seen under another. A node without a snapshot is a root or a branch, so the tree knows
    exactly the beginnings of what has a snapshot now.

    Eviction is GreedyDual-Size: value = clock + saved / num_bytes, where `saved` is the bytes to the nearest snapshot
    above (what a hit would have to run again without it), kept exact as neighbours come and go, and `clock` is the
    highest value evicted so far, as it stood when the snapshot was put in or last hit. The least value goes first; of
    equals, the one touched longest ago. A heap with stale entries finds it in O(log n) amortised; putting in or
    removing a snapshot also costs O(log n) for each of the nearest snapshots below it.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes")
        self.budget_bytes = budget_bytes
        self._roots: dict[str, _Node[Payload]] = {}
        self._num_bytes = self._num_snapshots = 0
        self._clock, self._touches = 0.0, 0
        # (value, touched, node): stale unless these are still the node's. No two nodes were touched at once, so
        # entries are ordered without comparing nodes.
        self._heap: list[tuple[float, int, _Node[Payload]]] = []

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def num_snapshots(self) -> int:
        return self._num_snapshots

    def payloads(self) -> Iterator[Payload]:
        """Every payload in the tree, in no stated order."""
        return (node.snapshot.payload for node in self._nodes() if node.snapshot is not None)

    def lookup(self, salt: str, data: bytes, limit: int | None = None) -> Match[Payload] | None:
        """The snapshot after the most bytes of `data`, `limit` at most; a hit counts as a touch."""
        longest = len(data) if limit is None else limit
        found = None
        for node in self._path(salt, data):
            if node.end > longest:
                break
            if node.snapshot is not None:
                found = node
        if found is None or found.snapshot is None:
            return None
        self._touch(found, found.snapshot)
        return Match(found.end, found.snapshot.payload)

    def shared(self, salt: str, data: bytes) -> int:
        """How many leading bytes of `data` the tree knows: where it branches off, be it inside an edge."""
        node = self._deepest(salt, data)
        if node is None:
            return 0
        child = node.children.get(data[node.end]) if node.end < len(data) else None
        return node.end + (0 if child is None else _num_common(child.edge, data, node.end))

    def insert(self, salt: str, data: bytes, payload: Payload, num_bytes: int) -> list[Payload]:
        """Puts a snapshot at the end of `data`.

        Returns what is no longer in the tree: those evicted to make room and one that was at the same place; or, the
        tree unchanged, the new payload alone where `num_bytes` (at least 1, else ValueError) exceeds the budget.
        """
        if num_bytes < 1:
            raise ValueError(f"a snapshot of {num_bytes} bytes")
        if num_bytes > self.budget_bytes:
            return [payload]
        returned: list[Payload] = []
        old = self._deepest(salt, data)
        if old is not None and old.end < len(data):
            old = None
        while self._num_bytes - (0 if old is None else old.num_bytes) + num_bytes > self.budget_bytes:
            returned += self.evict()  # be it the old one

        node = self._make(salt, data)
        if node.snapshot is None:
            self._num_snapshots += 1
        else:
            returned.append(node.snapshot.payload)
            self._num_bytes -= node.num_bytes
        node.snapshot = _Snapshot(payload, num_bytes, saved=node.end - _end_above(node))
        self._num_bytes += num_bytes
        self._touch(node, node.snapshot)
        self._reprice_below(node, node.end)
        return returned

    def evict(self, num: int = 1) -> list[Payload]:
        """Gives up the `num` least valuable, one after the other; fewer where there are not so many."""
        evicted: list[Payload] = []
        while len(evicted) < num and self._heap:
            value, touched, node = heapq.heappop(self._heap)
            snapshot = node.snapshot
            if snapshot is None or (snapshot.value, snapshot.touched) != (value, touched):
                continue
            self._clock = max(self._clock, value)  # a value may have fallen below, when a snapshot above came
            self._remove(node, snapshot)
            evicted.append(snapshot.payload)
        return evicted

    def clear(self) -> list[Payload]:
        """Gives up all, at once."""
        payloads = list(self.payloads())
        self._roots.clear()
        self._heap.clear()
        self._num_bytes = self._num_snapshots = 0
        return payloads

    def check(self) -> None:
        """Raises AssertionError unless the invariants hold."""
        priced = {(value, touched, id(node)) for value, touched, node in self._heap}
        num_bytes = num_snapshots = 0
        for salt, root in self._roots.items():
            assert root.salt == salt, "a root has another salt"
            assert root.parent is None, "a root has a parent"
            assert (root.edge, root.end) == (b"", 0), "a root has an edge"
            assert root.children or root.snapshot is not None, "a salt without snapshots keeps its root"
        for node in self._nodes():
            for first, child in node.children.items():
                assert child.edge, "an edge is empty"
                assert child.edge[0] == first, "a child stands under another's byte"
                assert (child.parent, child.salt) == (node, node.salt), "a child has another parent"
                assert child.end == node.end + len(child.edge), "an end is not the length of the path"
                assert child.snapshot is not None or len(child.children) > 1, "a node is neither snapshot nor branch"
            if node.snapshot is not None:
                num_snapshots += 1
                num_bytes += node.snapshot.num_bytes
                assert node.snapshot.saved == node.end - _end_above(node), "a snapshot's saved bytes are out of date"
                assert (node.snapshot.value, node.snapshot.touched, id(node)) in priced, "a snapshot cannot be evicted"
        assert (self._num_bytes, self._num_snapshots) == (num_bytes, num_snapshots), "sums are wrong"
        assert num_bytes <= self.budget_bytes, "over budget"

    def _nodes(self) -> Iterator[_Node[Payload]]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _path(self, salt: str, data: bytes) -> Iterator[_Node[Payload]]:
        """The nodes whose ends are beginnings of `data`, from the root on."""
        node = self._roots.get(salt)
        while node is not None:
            yield node
            child = node.children.get(data[node.end]) if node.end < len(data) else None
            node = child if child is not None and data.startswith(child.edge, node.end) else None

    def _deepest(self, salt: str, data: bytes) -> _Node[Payload] | None:
        deepest = None
        for node in self._path(salt, data):
            deepest = node
        return deepest

    def _make(self, salt: str, data: bytes) -> _Node[Payload]:
        """The node at the end of `data`; it is made, and an edge is split for it, where there is none."""
        node = self._roots.setdefault(salt, _Node(salt, b"", 0, None))
        while node.end < len(data):
            first = data[node.end]
            child = node.children.get(first)
            if child is None:
                child = _Node(salt, data[node.end :], len(data), node)
                node.children[first] = child
            elif (common := _num_common(child.edge, data, node.end)) < len(child.edge):
                branch = _Node(salt, child.edge[:common], node.end + common, node, {child.edge[common]: child})
                child.edge, child.parent = child.edge[common:], branch
                node.children[first] = child = branch
            node = child
        return node

    def _remove(self, node: _Node[Payload], snapshot: _Snapshot[Payload]) -> None:
        self._num_bytes -= snapshot.num_bytes
        self._num_snapshots -= 1
        node.snapshot = None
        self._reprice_below(node, node.end - snapshot.saved)
        if not node.children and node.parent is not None:
            del node.parent.children[node.edge[0]]
            node = node.parent
        if node.snapshot is not None or len(node.children) > 1:
            return
        if node.parent is not None:  # no branch any more: its one child's edge takes its place
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, node.parent
            node.parent.children[child.edge[0]] = child
        elif not node.children:
            del self._roots[node.salt]

    def _touch(self, node: _Node[Payload], snapshot: _Snapshot[Payload]) -> None:
        self._touches += 1
        snapshot.clock, snapshot.touched = self._clock, self._touches
        self._price(node, snapshot)

    def _reprice_below(self, node: _Node[Payload], above: int) -> None:
        """The nearest snapshot above those nearest below `node` now ends at `above`."""
        stack = list(node.children.values())
        while stack:
            below = stack.pop()
            if below.snapshot is None:
                stack.extend(below.children.values())
            else:
                below.snapshot.saved = below.end - above
                self._price(below, below.snapshot)

    def _price(self, node: _Node[Payload], snapshot: _Snapshot[Payload]) -> None:
        heapq.heappush(self._heap, (snapshot.value, snapshot.touched, node))
        if len(self._heap) > 2 * self._num_snapshots + 64:  # mostly stale
            self._heap = [
                (node.snapshot.value, node.snapshot.touched, node)
                for node in self._nodes()
                if node.snapshot is not None
            ]
            heapq.heapify(self._heap)


def _num_common(edge: bytes, data: bytes, start: int) -> int:
    """How many leading bytes of `edge` are those of `data` from `start` on."""
    low, high = 0, min(len(edge), len(data) - start)
    while low < high:
        middle = (low + high + 1) // 2
        if edge[low:middle] == data[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _end_above(node: _Node[Payload]) -> int:
    """Where the nearest snapshot above `node` ends; 0 if there is none."""
    above = node.parent
    while above is not None and above.snapshot is None:
        above = above.parent
    return 0 if above is None else above.end
