"""A deterministic engine without a model: what the server's tests talk to.

It completes a prompt by repeating its text from the start, one byte a tick and row. Words in the
prompt make it misbehave or wait; see `WORDS`. Every verdict, log-probability and count is a plain function
of the bytes, so a test can say what must come out. Built with a prefix cache, it knows every prompt that came before.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hnet_runtime.config import BOS, EOS
from hnet_runtime.engine.messages import (
    ByteLogprobs,
    Chunk,
    EngineInfo,
    EngineStats,
    GraphReplays,
    Output,
    Request,
    StageInfo,
    StepRecord,
    Tick,
    Usage,
)

WORDS = {
    b"!crash": "the engine raises after three bytes",
    b"!nan": "the row ends with an error after three bytes",
    b"!eos": "the model ends the text after five bytes",
    b"!exit": "the process ends after three bytes",
    b"!hang": "the tick takes an hour",
    b"!lost": "a message that no encoder knows is sent after three bytes",
    b"!park": "the row waits after two bytes, PARK_TICKS for stage 1 and as many for stage 2",
    b"!preempt": "the request says that it gave up its row twice",
}
PARK_TICKS = 50
PARK_SECONDS = (0.25, 2.0)  # what a wait for stage 1, 2 is said to have taken
STAGES = (3, 7)  # a chunk of stage 1 every 3 bytes, of stage 2 every 7


def logprob(byte: int) -> float:
    """The fake's log-probability of a byte, whatever came before."""
    return -0.5 - byte / 256


def verdicts(start: int, end: int) -> list[Chunk]:
    """The chunks that open in a span of bytes, in the engine's order."""
    return [
        Chunk(stage=stage, start=at, p=1.0 if at == 0 else 0.75)
        for at in range(start, end)
        for stage, every in enumerate(STAGES, start=1)
        if at % every == 0
    ]


def completion(prompt: bytes, choice: int = 0, seed: int = 0, temperature: float = 1.0) -> Iterator[int]:
    """The bytes the fake answers with: the prompt again and again, from where seed and choice say."""
    text = prompt.removeprefix(bytes((BOS,))) or b"nothing "
    start = (choice + seed) % len(text) if temperature else 0
    return itertools.islice(itertools.cycle(text), start, None)


def shared(one: bytes, other: bytes) -> int:
    """How many leading bytes two texts have in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass
class Row:
    request: Request
    submitted: float
    source: Iterator[int]
    data: bytearray = field(default_factory=bytearray)
    prefilled: bool = False
    cached: int = 0  # bytes of the prompt that the cache knew
    due: int = 0  # the stage it waits for; 0 while it does not
    wait: int = 0  # ticks left of that
    waited: list[int] = field(default_factory=list)  # stages it has waited for

    @property
    def preemptions(self) -> int:
        return 2 if b"!preempt" in self.request.prompt else 0


class FakeEngine:
    """The engine's interface (`server.engine_loop.Engine`) over the rules above."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, tick_seconds: float, journal: str | None, prefix_cache: bool
    ) -> None:
        stages = (
            StageInfo(stage=0, d_model=8, layout="m1 · m1", parameters=10),
            StageInfo(stage=1, d_model=8, layout="m1 · m1", parameters=20),
            StageInfo(stage=2, d_model=8, layout="T1", parameters=30),
        )
        self.info = EngineInfo(
            model="fake",
            device="cpu",
            dtype="float32",
            kernels="torch",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            stages=stages,
            embedding_parameters=5,
            load_seconds=0.0,
        )
        self.tick_seconds = tick_seconds
        self.journal = journal
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.pending: list[Output] = []
        self.prompt_bytes = self.generation_bytes = 0
        self.chunks = [0, 0]
        self.known: dict[str, list[bytes]] | None = {} if prefix_cache else None  # prompts by salt
        self.queried = self.hit = self.preemptions = 0
        self.park_waits: list[tuple[int, float]] = []  # of this tick

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.pending)

    def submit(self, request: Request) -> None:
        if request.prompt.endswith(b"!refuse"):
            raise ValueError("this prompt is refused")
        params = request.params
        source = completion(request.prompt, params.choice, params.seed, params.temperature)
        self.waiting.append(Row(request, time.monotonic(), source))
        self.note("submit", request.request_id)

    def abort(self, request_id: str) -> None:
        self.note("abort", request_id)
        for rows in (self.waiting, self.running):
            for row in rows:
                if row.request.request_id == request_id:
                    rows.remove(row)
                    self.pending.append(self.end(row, "abort"))
                    return

    def tick(self) -> Tick:
        began = time.monotonic()
        while self.waiting and len(self.running) < self.info.max_num_seqs:
            self.running.append(self.waiting.pop(0))
        outputs, self.pending = self.pending, []
        self.park_waits.clear()
        steps = []
        if self.running:
            if self.tick_seconds:
                time.sleep(self.tick_seconds)
            for row in list(self.running):
                if self.parks(row):
                    continue
                outputs.append(self.step(row))
                if outputs[-1].finish_reason is not None:
                    self.running.remove(row)
            steps = [StepRecord("byte", 0, len(outputs), time.monotonic() - began)]
        stats = EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            rows_in_use=len(self.running) / self.info.max_num_seqs,
            kv_in_use=0.25,
            prompt_bytes_total=self.prompt_bytes,
            generation_bytes_total=self.generation_bytes,
            chunks_total=tuple(self.chunks),
            parked=tuple(sum(row.due == stage for row in self.running) for stage in (1, 2)),
            preemptions_total=self.preemptions,
            prefix_cache_queries_bytes_total=self.queried,
            prefix_cache_hits_bytes_total=self.hit,
            prefix_cache_bytes=sum(map(len, itertools.chain(*(self.known or {}).values()))),
            park_waits=tuple(self.park_waits),
            steps=tuple(steps),
            replays=tuple(GraphReplays("byte", 64, "graph", 1) for _ in steps),  # as if it had a GPU
        )
        return Tick(outputs=tuple(outputs), stats=stats)

    def parks(self, row: Row) -> bool:
        """Whether the row waits in this tick."""
        if row.due:
            row.wait -= 1
            if row.wait:
                return True
            self.park_waits.append((row.due, PARK_SECONDS[row.due - 1]))
            row.waited.append(row.due)
            row.due = 0
        if b"!park" in row.request.prompt and len(row.data) == 2 and len(row.waited) < 2:
            row.due, row.wait = len(row.waited) + 1, PARK_TICKS
        return bool(row.due)

    def look_up(self, request: Request) -> int:
        """Bytes of the prompt that an earlier one of the same salt began with; from now on this one is known too."""
        if self.known is None or request.params.prompt_logprobs is not None:
            return 0
        prompts = self.known.setdefault(request.cache_salt, [])
        found = max((shared(prompt, request.prompt) for prompt in prompts), default=0)
        prompts.append(request.prompt)
        self.queried += len(request.prompt)
        self.hit += found
        return found

    def step(self, row: Row) -> Output:
        """One byte for one row; a prompt is read whole in the tick of its first byte."""
        request, params = row.request, row.request.params
        prompt = request.prompt
        extra: dict[str, Any] = {}
        start = len(prompt) + len(row.data) - 1
        if not row.prefilled:
            row.prefilled = True
            row.cached = self.look_up(request)
            self.prompt_bytes += len(prompt) - row.cached
            start = 0
            if params.prompt_logprobs is not None:
                extra["prompt_logprobs"] = tuple(self.score(byte, params.prompt_logprobs) for byte in prompt[1:])
        if params.max_tokens == 0:
            return self.end(row, "length", chunks=tuple(verdicts(0, len(prompt))), **extra)
        if len(row.data) == 3:
            self.misbehave(prompt)
            if b"!nan" in prompt:
                return self.end(row, "error", error="a logit is not a number")
        if len(row.data) == 5 and b"!eos" in prompt and not params.ignore_eos:
            return self.end(row, "stop", stop_reason=EOS)
        if len(row.data) == 3 and b"!lost" in prompt:
            row.data.append(next(row.source))
            return Output(request_id=request.request_id, data=b"-", stop_reason=object())  # type: ignore[arg-type]
        byte = next(row.source)
        row.data.append(byte)
        self.generation_bytes += 1
        known = verdicts(start, len(prompt) + len(row.data) - 1)
        extra["opened"] = sum(chunk.stage == 1 and chunk.start >= len(prompt) for chunk in known)
        if params.return_chunks:
            extra["chunks"] = tuple(known)
        for stop in params.stop:
            if row.data.endswith(stop):  # the tests' stop strings are one byte long: nothing to hold back
                return self.end(row, "stop", stop_reason=stop, **extra)
        if params.logprobs is not None:
            extra["logprobs"] = (self.score(byte, params.logprobs),)
        extra["data"] = bytes((byte,))
        if len(row.data) == params.max_tokens:
            return self.end(row, "length", **extra)
        return Output(request_id=request.request_id, **extra)

    def misbehave(self, prompt: bytes) -> None:
        if b"!crash" in prompt:
            raise RuntimeError("the fake engine\ncrashed")
        if b"!exit" in prompt:
            raise SystemExit(7)
        if b"!hang" in prompt:
            time.sleep(3600)

    def score(self, byte: int, alternatives: int) -> ByteLogprobs:
        top = tuple((other, logprob(other)) for other in range(alternatives))
        return ByteLogprobs(byte, logprob(byte), top, byte + 1)

    def end(self, row: Row, reason: Any, **extra: Any) -> Output:
        self.note(reason, row.request.request_id)
        num_bytes = len(row.request.prompt) + len(row.data)
        self.preemptions += row.preemptions
        chunks = tuple(math.ceil(num_bytes / every) for every in STAGES)
        self.chunks = [total + new for total, new in zip(self.chunks, chunks, strict=True)]
        usage = Usage(
            prompt_bytes=len(row.request.prompt),
            completion_bytes=len(row.data),
            chunks=chunks,
            queue_seconds=0.001,
            prefill_seconds=0.002,
            decode_seconds=time.monotonic() - row.submitted,
            cached_bytes=row.cached,
            park_seconds=sum(PARK_SECONDS[stage - 1] for stage in row.waited),
            preemptions=row.preemptions,
        )
        return Output(request_id=row.request.request_id, finish_reason=reason, usage=usage, **extra)

    def note(self, what: str, request_id: str) -> None:
        """Writes into the journal, where there is one, so that a test can see what reached the engine."""
        if self.journal is not None:
            with Path(self.journal).open("a") as file:
                file.write(json.dumps([what, request_id]) + "\n")


def build(
    max_num_seqs: int = 64,
    max_model_len: int = 512,
    tick_seconds: float = 0.0,
    load_seconds: float = 0.0,
    failure: str | None = None,
    journal: str | None = None,
    prefix_cache: bool = False,
    progress: Any = None,
) -> FakeEngine:
    """The factory: `EngineLaunch(factory="fake_engine:build", arguments={…})`."""
    time.sleep(load_seconds)
    if failure is not None:
        raise ValueError(failure)
    return FakeEngine(max_num_seqs, max_model_len, tick_seconds, journal, prefix_cache)
