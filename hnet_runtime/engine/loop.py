"""The loop: plan, run, commit, emit. A tick serves every live request once.

Knows requests and rows; no text, no HTTP and no sockets. Not safe for several threads at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.engine.flight import Flight, launch, row_sampling
from hnet_runtime.engine.messages import ByteLogprobs, Chunk, EngineStats, Output, Request, StepRecord, Tick
from hnet_runtime.engine.plan import ByteStep, Prefill, Span, StageStep, Work
from hnet_runtime.engine.request import LiveRequest, RequestError, validate
from hnet_runtime.engine.runner import Runner
from hnet_runtime.engine.sampler import RowSampling, Sampler, byte_logprobs
from hnet_runtime.engine.scheduler import Scheduler
from hnet_runtime.engine.structure import GRACE_SECONDS, StructureWorkers
from hnet_runtime.engine.utf8 import can_begin

log = logging.getLogger("hnet.engine")
_NOT_FINITE = "the model's logits are not finite"
_IDLE_SECONDS = 5e-3  # a tick that only waits for masks


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most: bytes of prompt and completion together."""

    max_model_len: int


class EngineLoop:
    """Continuous batching: requests join and leave at any tick.

    overlaps: where the next tick is known to be a byte more of the same rows, the device is given it before what this
    one brought is read. The device itself leaves out those who turn out to be over, or may be.

    debug_checks: conservation is checked after every tick, and a defect raises AssertionError.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
        limits: Limits,
        num_rows: int,
        debug_checks: bool = False,
        overlaps: bool = False,
    ) -> None:
        self._runner, self._sampler, self._scheduler, self._limits = runner, sampler, scheduler, limits
        self._num_rows = num_rows
        self._debug_checks, self._was_busy = debug_checks, False
        self._overlaps = overlaps
        self._ahead: Flight | None = None  # launched in the last tick, for the next one to land
        self._overlapped_ticks = 0
        self._park_waits: list[tuple[int, float]] = []  # since the last emit
        self._num_chunk_stages = len(runner.state.stages) - 1
        self._prompt_bytes = 0
        self._generated_bytes = 0
        self._chunks = [0] * self._num_chunk_stages
        self._over: list[LiveRequest] = []  # finished since the last emit
        self._touched: dict[LiveRequest, None] = {}  # those that live and may have gained something since then
        self._held: dict[LiveRequest, None] = {}  # whose next byte is not drawn yet
        self._workers = StructureWorkers()
        self._expected: dict[LiveRequest, RowSampling] = {}  # by what the rows of the step under way draw

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
        if request.params.constraint is not None and not can_begin(request.prompt, request.params.utf8):
            raise RequestError("prompt", "the prompt ends inside a character, which no constraint lets end")
        live = LiveRequest(request, self._num_chunk_stages, time.perf_counter())
        self._scheduler.enqueue(live)
        if live.structure is not None:
            self._workers.put([live.structure])

    def abort(self, request_id: str) -> None:
        """Frees the request's row at once, or where it rides in a step under way, when that has landed in the next
        tick; with that comes its last Output, with reason `abort`."""
        for rider in self._ahead.riders if self._ahead is not None else ():
            if rider.request_id == request_id:
                rider.finish("abort")
                return
        request = self._scheduler.cancel(request_id)
        if request is not None:
            request.finish("abort")
            self._over.append(request)

    def tick(self) -> Tick:
        self._check_idle()
        ticked = began = time.perf_counter()
        steps: list[StepRecord] = []
        spent = {True: 0.0, False: 0.0}  # seconds, of prompts and of what decodes
        planned = self._plan(began)
        for work in planned:
            steps += self._run(work)
            ended = time.perf_counter()
            spent[isinstance(work, Prefill)] += ended - began
            began = ended
        if self._held and not planned:
            self._workers.wait([r.structure for r in self._held if r.structure], _IDLE_SECONDS, for_all=False)
        self._scheduler.spent(decoding=spent[False], prefilling=spent[True])
        self._commit()
        if self._debug_checks:
            self._scheduler.check()
        tick = self._emit(steps)
        match planned:
            case (ByteStep(rows) | StageStep(rows=rows),) if self._scheduler.listens and self._ahead is None:
                outside = time.perf_counter() - ticked - sum(step.seconds for step in steps)
                self._scheduler.policy.observe_outside(len(rows), outside)
        return tick

    def _plan(self, now: float) -> tuple[Work | Flight, ...]:
        """What the tick is to run: the step that the last one launched ahead where it did, behind which nobody's row or
        page is given to another before it has landed."""
        flight, self._ahead = self._ahead, None
        if flight is not None:
            self._overlapped_ticks += bool(flight.riders)
            return (flight,)
        self._admit(now)
        self._draw_held()
        return self._scheduler.plan(now).work

    def _admit(self, now: float) -> None:
        """Rows for who waits; a prompt that is known to its end has its first byte at once."""
        ready = self._scheduler.admit(now)
        drawn = [(request, logits) for request, logits in ready if request.finish_reason is None]
        if drawn:
            self._sample([request for request, _ in drawn], torch.stack([logits for _, logits in drawn]))
        if ready:
            self._commit()

    def _draw_held(self) -> None:
        """The bytes of those whose masks have come."""
        for request in [each for each in self._held if each.finish_reason is not None]:
            del self._held[request]
        ready = [r for r in self._held if r.row is not None and r.structure is not None and r.structure.ready]
        if not ready:
            return
        logits = torch.stack([request.held for request in ready])
        for request in ready:
            del self._held[request]
            request.held = None
        self._sample(ready, logits)
        self._commit()

    def _run(self, work: Work | Flight) -> list[StepRecord]:
        match work:
            case Flight():
                return self._fly(work)
            case ByteStep(rows, through):
                requests = [self._scheduler[row] for row in rows]
                return self._step(requests, bytes(request.output[-1] for request in requests), 0, through)
            case StageStep(stage, rows, through):
                return self._step([self._scheduler[row] for row in rows], b"", stage, through)
            case Prefill(spans):
                return self._prefill(spans)

    def _step(self, requests: list[LiveRequest], data: bytes, stage: int, through: bool) -> list[StepRecord]:
        flight = launch(self._runner, self._sampler, requests, data, stage, through=through)
        return self._fly(flight) if through and not stage else self._land(flight, self._scheduler.listens)

    def _fly(self, flight: Flight) -> list[StepRecord]:
        """Lands a step of bytes through every stage, the next tick's launched behind it where that is known."""
        listens = self._scheduler.listens
        self._ahead = self._launch_behind(flight) if self._overlaps else None
        records = self._land(flight, listens)
        if self._ahead is not None:
            self._ahead.board()
        return records

    def _launch_behind(self, flight: Flight) -> Flight | None:
        requests, unread = [], []
        for request in self._scheduler.goes_on():
            rides = request in flight.riders
            if not rides or request.params.max_tokens - len(request.output) > 1:  # else its last byte is on its way
                requests.append(request)
                unread.append(rides)
        if not requests:
            return None
        self._scheduler.went_on(len(requests))
        data = bytes(0 if rides else each.output[-1] for each, rides in zip(requests, unread, strict=True))
        return launch(self._runner, self._sampler, requests, data, through=True, unread=unread)

    def _land(self, flight: Flight, listens: bool) -> list[StepRecord]:
        """What a step brought; listens: whether the policy is told of it."""
        scheduler = self._scheduler
        requests, result = flight.land()
        now = time.perf_counter()
        ended: list[LiveRequest] = []  # whose byte came to its end
        for request, is_finished, opened in zip(requests, result.finished, result.chunks, strict=True):
            if is_finished:
                ended.append(request)
            if request.finish_reason is not None:
                continue  # it was aborted on the way
            self._saw_chunks(request, opened)
            if flight.stage:
                waited = scheduler.unpark(request, flight.began)
                self._park_waits.append((flight.stage, waited))
            if not is_finished:
                scheduler.park(request, flight.stage + 1, now)
        for work in result.work:
            scheduler.ran(work.stage, work.positions)
        if listens:
            for work in result.work:
                scheduler.policy.observe(work.stage, work.positions, work.seconds)
            for routed in result.routed:
                scheduler.policy.saw(routed.stage, routed.positions, routed.boundaries)
        kept = [place for place, request in enumerate(ended) if request.finish_reason is None]
        if kept:
            logits = result.logits if len(kept) == len(ended) else result.logits[kept]
            self._expected = flight.expected
            self._sample([ended[place] for place in kept], logits)
            self._expected = {}
        return result.records

    def _prefill(self, spans: Sequence[Span]) -> list[StepRecord]:
        requests = [self._scheduler[span.row] for span in spans]
        result = self._runner.prefill(
            [span.row for span in spans],
            [r.piece(span.begin, span.end) for r, span in zip(requests, spans, strict=True)],
            [
                span.end - span.begin
                if r.params.prompt_logprobs is not None and r.is_reading
                else int(span.completes or span.snapshot)
                for r, span in zip(requests, spans, strict=True)
            ],
        )
        for work in result.work:
            self._scheduler.ran(work.stage, work.positions)
        ready: list[tuple[LiveRequest, Tensor]] = []
        for request, span, opened, logits in zip(requests, spans, result.chunks, result.logits, strict=True):
            self._prompt_bytes += (span.end - span.begin) * request.is_reading
            self._saw_chunks(request, opened)
            self._scheduler.read(request)
            prompt_logprobs = []
            sound = bool(torch.isfinite(logits).all())
            if request.params.prompt_logprobs is not None and request.is_reading and sound:
                # Position i predicts prompt byte i + 1; the last position predicts the completion's first.
                following = request.request.prompt[span.begin + 1 : span.end + 1]
                tops = [request.params.prompt_logprobs] * len(following)
                prompt_logprobs = byte_logprobs(logits[: len(following)], following, tops)
            request.prefilled(span.end, prompt_logprobs, time.perf_counter())
            if not sound:
                request.finish("error", error=_NOT_FINITE)
                continue
            if span.snapshot:
                self._scheduler.reached(request, logits[-1].clone())
            if span.completes and request.finish_reason is None:
                ready.append((request, logits[-1]))
        if ready:
            self._sample([request for request, _ in ready], torch.stack([logits for _, logits in ready]))
        return result.records

    def _saw_chunks(self, request: LiveRequest, chunks: list[Chunk]) -> None:
        request.saw_chunks(chunks)
        self._touched[request] = None
        for chunk in chunks:
            self._chunks[chunk.stage - 1] += 1

    def _sample(self, requests: list[LiveRequest], logits: Tensor) -> None:
        """Draws each request's next byte from logits [B, V]; a row whose logits are not finite ends, and no other, as
        does one that its parameters leave no byte."""
        structured = [request for request in requests if request.structure is not None]
        if structured:
            kept = self._to_draw(requests, logits)
            if len(kept) < len(requests):
                requests, logits = [requests[index] for index in kept], logits[kept]
        if requests:
            self._draw(requests, logits)
        if structured:
            self._workers.put([r.structure for r in structured if r.structure and r.finish_reason is None])

    def _to_draw(self, requests: list[LiveRequest], logits: Tensor) -> list[int]:
        """Which of them are to have a byte drawn now. Of the others a constraint leaves no choice, or its mask is not
        ready; most others wait a little for one that will soon be."""
        awaited = [r.structure for r in requests if r.structure is not None and not r.structure.ready]
        if soon := [each for each in awaited if each.is_compiled and not each.is_late]:
            self._workers.wait(soon, GRACE_SECONDS)
        kept = []
        for index, request in enumerate(requests):
            if request.structure is None:
                kept.append(index)
                continue
            request.structure.is_late = not request.structure.ready
            if request.structure.is_late:
                request.held = logits[index].clone()
                self._held[request] = None
                continue
            before = len(request.output)
            if not request.settle():
                kept.append(index)
                continue
            self._gained(request, before, logits[index])
        return kept

    def _draw(self, requests: list[LiveRequest], logits: Tensor) -> None:
        rows = [self._expected.get(request) or row_sampling(request) for request in requests]
        stuck = {i for i, row in enumerate(rows) if row.allowed is not None and not row.allowed.any()}
        if stuck:
            for index in stuck:
                requests[index].run_dry()
            kept = [index for index in range(len(requests)) if index not in stuck]
            requests, rows, logits = [requests[i] for i in kept], [rows[i] for i in kept], logits[kept]
            if not requests:
                return
        drawn = self._sampler.draw(_penalised(requests, logits), rows)
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
            self._gained(request, before, logits[index])

    def _gained(self, request: LiveRequest, before: int, logits: Tensor) -> None:
        """A request that had `before` bytes may have more now, and may be over; logits: [V] after the last that was
        fed."""
        self._touched[request] = None
        if request.finish_reason is not None:
            request.last_logits = logits.clone()
        self._generated_bytes += max(len(request.output) - before, 0)  # an EOS is none

    def _commit(self) -> None:
        """Frees what ended, so that the next tick's plan can use it. Nobody of them rides in a step under way."""
        for request in self._scheduler.live():
            if request.finish_reason is not None:
                if request.row is not None and request.last_logits is not None:
                    self._scheduler.ended(request, self._runner.num_fed(request.row))
                    request.last_logits = None
                self._scheduler.release(request)
                self._over.append(request)

    def _check_idle(self) -> None:
        """Conservation, once whenever a tick finds nothing to do. A defect found then has cost nobody anything yet: it
        is logged."""
        is_busy = bool(self._scheduler.num_live or self._scheduler.num_waiting)
        if self._was_busy and not is_busy:
            try:
                self._scheduler.check()
            except AssertionError:
                log.exception("rows or pages are not what they should be")
        self._was_busy = is_busy

    def _emit(self, steps: list[StepRecord]) -> Tick:
        now = time.perf_counter()
        over, self._over = self._over, []
        outputs: list[Output] = []
        for request in (*(each for each in self._touched if each.finish_reason is None), *over):
            output = request.take_output(now)
            if output is not None:
                outputs.append(output)
        self._touched.clear()
        return Tick(outputs=tuple(outputs), stats=self._stats(tuple(steps)))

    def _stats(self, steps: tuple[StepRecord, ...]) -> EngineStats:
        scheduler = self._scheduler
        waits, self._park_waits = self._park_waits, []
        return EngineStats(
            running=scheduler.num_live,
            waiting=scheduler.num_waiting,
            rows_in_use=scheduler.num_live / self._num_rows,
            kv_in_use=scheduler.kv_in_use,
            prompt_bytes_total=self._prompt_bytes,
            generation_bytes_total=self._generated_bytes,
            chunks_total=tuple(self._chunks),
            parked=scheduler.num_parked,
            preemptions_total=scheduler.num_preemptions,
            overlapped_ticks_total=self._overlapped_ticks,
            prefix_cache_queries_bytes_total=scheduler.num_queried_bytes,
            prefix_cache_hits_bytes_total=scheduler.num_hit_bytes,
            prefix_cache_bytes=scheduler.cached_bytes,
            park_waits=tuple(waits),
            steps=steps,
            replays=self._runner.take_replays(),
        )


@torch.inference_mode()
def _penalised(requests: list[LiveRequest], logits: Tensor) -> Tensor:
    """The logits [B, V] that bytes are drawn from: the model's own, or a copy where a request asks for other ones."""
    asked = [(index, r.penalties) for index, r in enumerate(requests) if r.penalties is not None]
    if not asked:
        return logits
    own = logits[[index for index, _ in asked]].cpu().numpy()
    changed = np.stack([penalties.apply(row) for row, (_, penalties) in zip(own, asked, strict=True)])
    logits = logits.clone()
    logits[[index for index, _ in asked]] = torch.from_numpy(changed).to(logits.device)
    return logits
