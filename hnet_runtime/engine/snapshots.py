"""What of a row outlives it: its state after some bytes, for other rows to begin from. Knows no tensors: a row's saved
state and its logits are opaque here."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hnet_runtime.engine.messages import Chunk


class ChunkHistory:
    """The chunks that a sequence of bytes opened, in nine bytes each."""

    __slots__ = ("_p", "_stages", "_starts")

    def __init__(self) -> None:
        self._stages, self._starts, self._p = array("B"), array("i"), array("f")

    def add(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._stages.append(chunk.stage)
            self._starts.append(chunk.start)
            self._p.append(chunk.p)  # exact: it was computed in fp32

    def copy(self) -> ChunkHistory:
        other = ChunkHistory()
        other._stages, other._starts, other._p = self._stages[:], self._starts[:], self._p[:]
        return other

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[Chunk]:
        return map(Chunk, self._stages, self._starts, self._p)

    @property
    def num_bytes(self) -> int:
        return sum(len(part) * part.itemsize for part in (self._stages, self._starts, self._p))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a row at rest after its first `length` bytes.

    saved: what the arenas copied of it; pages: of each stage that keeps pages, those it holds; chunks: all that the
    bytes opened; logits: [V] after the last of them; num_bytes: what it takes beside the pages.
    """

    length: int
    saved: Any
    pages: tuple[tuple[int, ...], ...]
    chunks: ChunkHistory
    logits: Any
    num_bytes: int


@dataclass(eq=False)
class Pinned:
    """A snapshot kept for `users` requests that wait for it; None once it is let go."""

    snapshot: Snapshot | None
    users: int
