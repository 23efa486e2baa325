"""Work as types: what one tick computes. Knows rows and byte ranges; no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Bytes begin…end of a row's prompt, or of what it has to write; `completes` where a byte is to be drawn after
    them, `snapshot` where the row's state is wanted as it is then."""

    row: int
    begin: int
    end: int
    completes: bool
    snapshot: bool = False


@dataclass(frozen=True)
class Prefill:
    """Bytes that are known before they run, one piece a row, run packed."""

    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return sum(span.end - span.begin for span in self.spans)


@dataclass(frozen=True)
class ByteStep:
    """The newest byte of each row. Rows that open a chunk go `through` every stage that is due for it, or else park."""

    rows: tuple[int, ...]
    through: bool = True


@dataclass(frozen=True)
class StageStep:
    """Rows that parked before `stage`: it runs, and those that finish their byte in it come out at the head. Those that
    open a chunk in it go `through`, or else park before the next one."""

    stage: int
    rows: tuple[int, ...]
    through: bool = True


Work = Prefill | ByteStep | StageStep


@dataclass(frozen=True)
class Plan:
    """The work of one tick, in order. Steps come first, so that running streams do not wait for prompts."""

    work: tuple[Work, ...]
