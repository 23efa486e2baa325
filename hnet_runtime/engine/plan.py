"""Work as types: what one tick computes. Knows rows and byte ranges; no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Bytes begin…end of a row's prompt; `completes` where the prompt ends with it."""

    row: int
    begin: int
    end: int
    completes: bool


@dataclass(frozen=True)
class Prefill:
    """Pieces of prompts, one a row, run packed."""

    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return sum(span.end - span.begin for span in self.spans)


@dataclass(frozen=True)
class ByteStep:
    """The newest byte of each row, run through every stage that is due for it."""

    rows: tuple[int, ...]


Work = Prefill | ByteStep


@dataclass(frozen=True)
class Plan:
    """The work of one tick, in order. Steps come first, so that running streams do not wait for prompts."""

    work: tuple[Work, ...]
