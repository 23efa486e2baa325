"""A model made of integers, for tests of bookkeeping: what a row has fed is its state, and the keys of a stage with
pages are the very bytes that are its positions. Two routed stages; whether a byte opens a chunk, the byte says."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hnet_runtime.engine.memory import RowMemory
from hnet_runtime.engine.messages import Chunk
from hnet_runtime.engine.plan import ByteStep, Prefill, StageStep
from hnet_runtime.engine.policies import Decision, Fire, Policy, Situation, Step, Through
from hnet_runtime.engine.request import LiveRequest
from hnet_runtime.engine.scheduler import PrefillRules, Scheduler
from hnet_runtime.state.rows import PAGE, PagePool, RowPool, StagePages

NUM_STAGES = 3
DEPTH = {ord(letter): depth for letter, depth in {"T": 2, "!": 2, "a": 1}.items()}  # stages that a byte opens
ALPHABET = b"aTb!c"


def next_byte(sequence: bytes) -> int:
    """What the model says after a sequence."""
    return ALPHABET[zlib.crc32(sequence) % len(ALPHABET)]


@dataclass(frozen=True)
class FakeSaved:
    fed: bytes
    positions: tuple[int, ...]
    pages: tuple[tuple[tuple[int, ...], ...], ...] | None = None  # contents, of a swap
    num_bytes: int = 100


class FakeArenas:
    """Rows of the model. Stages 1 and 2 keep pages, each pool as many as `pages` says."""

    def __init__(self, rows: int, pages: Sequence[int], most: int) -> None:
        self.fed = [b""] * (rows + 1)
        self.positions = [np.zeros(rows + 1, dtype=np.int64) for _ in range(NUM_STAGES)]
        first = NUM_STAGES - len(pages)
        self.pages = [
            StagePages(stage, PagePool(rows + 1, count, most), self.positions[stage])
            for stage, count in enumerate(pages, start=first)
        ]
        self.keys = {each.stage: np.full((each.pool.num_pages + 1, PAGE), -1, dtype=np.int64) for each in self.pages}
        self.swaps = 0

    # ── what RowMemory asks for ──

    def reset(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.load(row, FakeSaved(b"", (0,) * NUM_STAGES))

    def save(self, row: int) -> FakeSaved:
        return FakeSaved(self.fed[row], tuple(int(counts[row]) for counts in self.positions))

    def load(self, row: int, saved: FakeSaved) -> None:
        self.fed[row] = saved.fed
        for counts, count in zip(self.positions, saved.positions, strict=True):
            counts[row] = count

    def copy_page(self, stage: int, source: int, target: int) -> None:
        self.keys[stage][target] = self.keys[stage][source]

    def swap_out(self, row: int) -> FakeSaved:
        self.swaps += 1
        saved = self.save(row)
        contents = tuple(tuple(self.keys_of(each, row)) for each in self.pages)
        self.fed[row] = b"gone"
        return FakeSaved(saved.fed, saved.positions, contents)

    def swap_in(self, row: int, swapped: FakeSaved) -> None:
        self.load(row, swapped)
        assert swapped.pages is not None
        for each, contents in zip(self.pages, swapped.pages, strict=True):
            for position, key in enumerate(contents):
                self._write(each, row, position, key)

    # ── what a runner does ──

    def feed(self, row: int, byte: int, *, through: bool) -> tuple[list[Chunk], bool]:
        """One byte at stage 0; what it opened, and whether it came to its end."""
        start = len(self.fed[row])
        self.fed[row] += bytes([byte])
        self._take(0, row, byte)
        return self._open(0, row, byte, start, through)

    def fire(self, stage: int, row: int, *, through: bool) -> tuple[list[Chunk], bool]:
        """The newest byte of a parked row at the stage that it waits for."""
        byte = self.fed[row][-1]
        self._take(stage, row, byte)
        return self._open(stage, row, byte, len(self.fed[row]) - 1, through)

    def _open(self, stage: int, row: int, byte: int, start: int, through: bool) -> tuple[list[Chunk], bool]:
        opened: list[Chunk] = []
        while stage < NUM_STAGES - 1 and DEPTH.get(byte, 0) > stage:
            stage += 1
            opened.append(Chunk(stage, start, 0.75))
            if not through:
                return opened, False
            self._take(stage, row, byte)
        return opened, True

    def _take(self, stage: int, row: int, byte: int) -> None:
        for each in self.pages:
            if each.stage == stage:
                self._write(each, row, int(self.positions[stage][row]), byte)
        self.positions[stage][row] += 1

    def _write(self, pages: StagePages, row: int, position: int, key: int) -> None:
        page = int(pages.pool.table[row, position // PAGE])
        assert page, "a position without a page"
        self.keys[pages.stage][page, position % PAGE] = key

    def keys_of(self, pages: StagePages, row: int) -> list[int]:
        table, store = pages.pool.table[row], self.keys[pages.stage]
        count = int(pages.positions[row])
        return [int(store[table[at // PAGE], at % PAGE]) for at in range(count)]

    def verify(self, row: int, sequence: bytes, due: int) -> None:
        """The row's state is that of the sequence, whose last byte waits for stage `due` where that is not 0."""
        assert self.fed[row] == sequence
        for pages in self.pages:
            reached = [byte for byte in sequence if DEPTH.get(byte, 0) >= pages.stage]
            waits = due and sequence and DEPTH.get(sequence[-1], 0) >= pages.stage >= due
            assert self.keys_of(pages, row) == (reached[:-1] if waits else reached)


class Scripted:
    """A policy whose decisions are any that are legal, by a list of numbers."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers) or [0]
        self._at = 0

    def choose(self, situation: Situation) -> Decision:
        legal: list[Decision] = [Step(), Through()] if situation.runnable else []
        for lane in situation.lanes:
            if lane.waiting:
                legal += [Fire(lane.stage), Fire(lane.stage, through=True)]
        self._at += 1
        return legal[self._numbers[self._at % len(self._numbers)] % len(legal)]

    def goes_through(self, situation: Situation) -> bool:
        return False

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        assert rows > 0

    def observe_outside(self, rows: int, seconds: float) -> None:
        assert rows > 0

    def saw(self, stage: int, positions: int, boundaries: int) -> None:
        assert 0 <= boundaries <= positions


class FakeEngine:
    """What `EngineLoop` does, on integers."""

    def __init__(
        self,
        policy: Policy,
        rows: int = 4,
        pages: Sequence[int] = (),
        most: int = 100 * PAGE,
        cache_bytes: int = 0,
        rules: PrefillRules | None = None,
    ) -> None:
        self.arenas = FakeArenas(rows, pages, most)
        self.memory = RowMemory(RowPool(rows), self.arenas.pages, self.arenas, cache_bytes)
        self.scheduler = Scheduler(self.memory, policy, NUM_STAGES, rules)
        self.now = 0.0
        self.over: list[LiveRequest] = []
        self.last_plan: tuple[Any, ...] = ()

    def tick(self) -> None:
        self.now += 1.0
        for request, logits in self.scheduler.admit(self.now):
            if request.finish_reason is None:
                assert bytes(logits) == request.request.prompt
                self._sample(request)
        self._commit()
        self.last_plan = self.scheduler.plan(self.now).work
        for work in self.last_plan:
            match work:
                case ByteStep(rows, through):
                    for row in rows:
                        request = self.scheduler[row]
                        fed = self.arenas.feed(row, request.output[-1], through=through)
                        self._stepped(request, 0, *fed)
                case StageStep(stage, rows, through):
                    for row in rows:
                        request = self.scheduler[row]
                        self.scheduler.unpark(request, self.now)
                        self._stepped(request, stage, *self.arenas.fire(stage, row, through=through))
                case Prefill(spans):
                    for span in spans:
                        self._prefill(self.scheduler[span.row], span.end, span.snapshot)
        self._commit()

    def _stepped(self, request: LiveRequest, stage: int, opened: list[Chunk], is_finished: bool) -> None:
        request.saw_chunks(opened)
        if is_finished:
            self._sample(request)
        else:
            self.scheduler.park(request, stage + 1, self.now)

    def _prefill(self, request: LiveRequest, end: int, snapshot: bool) -> None:
        for byte in request.request.prompt[request.fed : end]:
            opened, _ = self.arenas.feed(request.row or 0, byte, through=True)
            request.saw_chunks(opened)
        self.scheduler.read(request)
        request.prefilled(end, [], self.now)
        if snapshot:
            self.scheduler.reached(request, request.request.prompt[:end])
        if not request.is_prefilling and request.finish_reason is None:
            self._sample(request)

    def _sample(self, request: LiveRequest) -> None:
        sequence = request.sequence(1 << 30)
        request.append(next_byte(sequence), None)
        if request.finish_reason is not None:
            request.last_logits = sequence

    def _commit(self) -> None:
        for request in self.scheduler.live():
            if request.finish_reason is not None:
                if request.last_logits is not None and request.row is not None:
                    self.scheduler.ended(request, int(self.arenas.positions[0][request.row]))
                self.scheduler.release(request)
                self.over.append(request)

    def verify(self) -> None:
        """Nothing leaks, and every row holds its own."""
        self.scheduler.check()
        for request in self.scheduler.live():
            row = request.row or 0
            fed = int(self.arenas.positions[0][row])
            self.arenas.verify(row, request.sequence(fed), request.due)
