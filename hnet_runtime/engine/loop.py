"""The loop: plan, run, commit, emit. A tick serves every live request once.

Knows requests and rows; no text, no HTTP and no sockets. Not safe for several threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hnet_runtime.engine.messages import ByteLogprobs, Chunk, EngineStats, Output, Request, StepRecord, Tick
from hnet_runtime.engine.plan import ByteStep, Plan, Prefill, Span, Work
from hnet_runtime.engine.request import LiveRequest, RequestError, validate
from hnet_runtime.engine.runner import Runner
from hnet_runtime.engine.sampler import RowSampling, Sampler, byte_logprobs
from hnet_runtime.engine.scheduler import Scheduler

_NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most: bytes of prompt and completion together."""

    max_model_len: int


class EngineLoop:
    """Continuous batching in lock-step: requests join and leave at any tick."""

    def __init__(self, runner: Runner, sampler: Sampler, scheduler: Scheduler, limits: Limits, num_rows: int) -> None:
        self._runner, self._sampler, self._scheduler, self._limits = runner, sampler, scheduler, limits
        self._num_rows = num_rows
        self._num_chunk_stages = len(runner.state.stages) - 1
        self._prompt_bytes = 0
        self._generated_bytes = 0
        self._chunks = [0] * self._num_chunk_stages
        self._over: list[LiveRequest] = []  # finished since the last emit

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.num_live or self._scheduler.num_waiting or self._over)

    def __contains__(self, request_id: str) -> bool:
        """Whether the request still has an Output to give."""
        return request_id in self._scheduler or any(request.request_id == request_id for request in self._over)

    def submit(self, request: Request) -> None:
        """Queues a request; raises RequestError, naming the parameter, if it cannot be served."""
        validate(request.params)
        length, limit = len(request.prompt), self._limits.max_model_len
        if not request.prompt:
            raise RequestError("prompt", "the prompt is empty; it must hold at least one byte, such as BOS (254)")
        if length > limit or (length == limit and request.params.max_tokens):
            raise RequestError("prompt", f"the prompt has {length} bytes; prompt and completion may have {limit}")
        if length + request.params.max_tokens > limit:
            raise RequestError(
                "max_tokens",
                f"the prompt has {length} bytes, which leaves {limit - length} of {limit} for the completion, "
                f"not {request.params.max_tokens}",
            )
        self._scheduler.enqueue(LiveRequest(request, self._num_chunk_stages, time.perf_counter()))

    def abort(self, request_id: str) -> None:
        """Frees the request's row at once; its last Output, with reason `abort`, comes with the next tick."""
        request = self._scheduler.cancel(request_id)
        if request is not None:
            request.finish("abort")
            self._over.append(request)

    def tick(self) -> Tick:
        plan = self._plan()
        steps = [record for work in plan.work for record in self._run(work)]
        self._commit()
        return self._emit(steps)

    def _plan(self) -> Plan:
        admitted = self._scheduler.admit(time.perf_counter())
        if admitted:
            self._runner.reset(admitted)
        return self._scheduler.plan()

    def _run(self, work: Work) -> list[StepRecord]:
        match work:
            case ByteStep(rows):
                return self._step(rows)
            case Prefill(spans):
                return self._prefill(spans)

    def _step(self, rows: Sequence[int]) -> list[StepRecord]:
        requests = [self._scheduler[row] for row in rows]
        result = self._runner.step(rows, bytes(request.output[-1] for request in requests))
        for request, opened in zip(requests, result.chunks, strict=True):
            self._saw_chunks(request, opened)
        self._sample(requests, result.logits)
        return result.records

    def _prefill(self, spans: Sequence[Span]) -> list[StepRecord]:
        requests = [self._scheduler[span.row] for span in spans]
        result = self._runner.prefill(
            [span.row for span in spans],
            [r.request.prompt[span.begin : span.end] for r, span in zip(requests, spans, strict=True)],
            [
                span.end - span.begin if r.params.prompt_logprobs is not None else int(span.completes)
                for r, span in zip(requests, spans, strict=True)
            ],
        )
        ready: list[tuple[LiveRequest, Tensor]] = []
        for request, span, opened, logits in zip(requests, spans, result.chunks, result.logits, strict=True):
            self._prompt_bytes += span.end - span.begin
            self._saw_chunks(request, opened)
            prompt_logprobs = []
            sound = bool(torch.isfinite(logits).all())
            if request.params.prompt_logprobs is not None and sound:
                # Position i predicts prompt byte i + 1; the last position predicts the completion's first.
                following = request.request.prompt[span.begin + 1 : span.end + 1]
                tops = [request.params.prompt_logprobs] * len(following)
                prompt_logprobs = byte_logprobs(logits[: len(following)], following, tops)
            request.prefilled(span.end, prompt_logprobs, time.perf_counter())
            if not sound:
                request.finish("error", error=_NOT_FINITE)
            elif span.completes and request.finish_reason is None:
                ready.append((request, logits[-1]))
        if ready:
            self._sample([request for request, _ in ready], torch.stack([logits for _, logits in ready]))
        return result.records

    def _saw_chunks(self, request: LiveRequest, chunks: list[Chunk]) -> None:
        request.saw_chunks(chunks)
        for chunk in chunks:
            self._chunks[chunk.stage - 1] += 1

    def _sample(self, requests: list[LiveRequest], logits: Tensor) -> None:
        """Draws each request's next byte from logits [B, V]; a row whose logits are not finite ends, and no other."""
        rows = [RowSampling(r.params, r.mask_row, _uniform(r)) for r in requests]
        drawn = self._sampler.draw(logits, rows)
        asked = [i for i, r in enumerate(requests) if r.params.logprobs is not None and drawn[i] is not None]
        logprobs: dict[int, ByteLogprobs] = {}
        if asked:
            tops = [requests[index].params.logprobs or 0 for index in asked]
            entries = byte_logprobs(logits[asked], bytes(drawn[index] or 0 for index in asked), tops)
            logprobs = dict(zip(asked, entries, strict=True))
        for index, (request, byte) in enumerate(zip(requests, drawn, strict=True)):
            if byte is None:
                request.finish("error", error=_NOT_FINITE)
                continue
            before = len(request.output)
            request.append(byte, logprobs.get(index))
            self._generated_bytes += max(len(request.output) - before, 0)  # an EOS is none

    def _commit(self) -> None:
        """Frees what ended, so that the next tick's plan can use it."""
        for request in self._scheduler.live():
            if request.finish_reason is not None:
                self._scheduler.release(request)
                self._over.append(request)

    def _emit(self, steps: list[StepRecord]) -> Tick:
        now = time.perf_counter()
        over, self._over = self._over, []
        outputs: list[Output] = []
        for request in (*self._scheduler.live(), *over):
            output = request.take_output(now)
            if output is not None:
                outputs.append(output)
        return Tick(outputs=tuple(outputs), stats=self._stats(tuple(steps)))

    def _stats(self, steps: tuple[StepRecord, ...]) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_live,
            waiting=scheduler.num_waiting,
            rows_in_use=scheduler.num_live / self._num_rows,
            kv_in_use=scheduler.kv_in_use,
            prompt_bytes_total=self._prompt_bytes,
            generation_bytes_total=self._generated_bytes,
            chunks_total=tuple(self._chunks),
            steps=steps,
        )


def _uniform(request: LiveRequest) -> float:
    return request.random[len(request.output)] if request.params.temperature else 0.0
