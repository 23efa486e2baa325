"""One live request: where its bytes stand, and what each new byte means for it. No tensors, no text."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hnet_runtime.config import EOS, VOCAB_SIZE
from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import (
    ByteLogprobs,
    Chunk,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Usage,
)
from hnet_runtime.engine.shaping import ByteFilter, Penalties
from hnet_runtime.engine.snapshots import ChunkHistory, Pinned, Snapshot
from hnet_runtime.engine.stops import StopMatcher
from hnet_runtime.engine.structure import Structure

_DRAWS = 256  # random numbers made at once
_NO_BYTE = "no byte may come: utf8, allowed_token_ids, bad_words, min_tokens and a constraint together leave none"


class RequestError(ValueError):
    """A request that cannot be served; `param` names what is wrong with it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def validate(params: SamplingParams) -> None:
    """Raises RequestError for values out of range; NaN is out of every range."""
    checks = (
        ("max_tokens", params.max_tokens >= 0, "must be at least 0"),
        ("temperature", 0.0 <= params.temperature < float("inf"), "must be a finite number of at least 0"),
        ("top_k", params.top_k >= 0, "must be at least 0 (0 keeps all bytes)"),
        ("top_p", 0.0 < params.top_p <= 1.0, "must be above 0 and at most 1"),
        ("min_p", 0.0 <= params.min_p <= 1.0, "must be between 0 and 1"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= VOCAB_SIZE, "must be between 0 and 256"),
        (
            "prompt_logprobs",
            params.prompt_logprobs is None or 0 <= params.prompt_logprobs <= VOCAB_SIZE,
            "must be between 0 and 256",
        ),
        ("presence_penalty", -2.0 <= params.presence_penalty <= 2.0, "must be between -2 and 2"),
        ("frequency_penalty", -2.0 <= params.frequency_penalty <= 2.0, "must be between -2 and 2"),
        ("repetition_penalty", 0.0 < params.repetition_penalty < float("inf"), "must be a finite number above 0"),
        (
            "logit_bias",
            all(_is_byte(byte) and -100.0 <= bias <= 100.0 for byte, bias in params.logit_bias),
            "must give bytes (0-255) numbers between -100 and 100",
        ),
        (
            "allowed_token_ids",
            params.allowed_token_ids is None
            or (bool(params.allowed_token_ids) and all(map(_is_byte, params.allowed_token_ids))),
            "must hold bytes (0-255), and at least one",
        ),
        ("bad_words", all(params.bad_words), "must not hold an empty string"),
        ("min_tokens", 0 <= params.min_tokens <= max(params.max_tokens, 0), "must be between 0 and max_tokens"),
        ("stop_token_ids", all(map(_is_byte, params.stop_token_ids)), "must hold bytes (0-255)"),
        ("stop", all(params.stop), "must not hold an empty string"),
        ("utf8", params.utf8 in ("strict", "raw"), "must be 'strict' or 'raw'"),
    )
    for name, holds, message in checks:
        if not holds:
            raise RequestError(name, f"{name} {message}, not {getattr(params, name)!r}")


def _is_byte(number: int) -> bool:
    return 0 <= number < VOCAB_SIZE


@dataclass
class RandomStream:
    """Uniform numbers in [0, 1) by index: Philox keyed by (seed, choice), its counter the index.

    Number i is a function of seed, choice and i alone.
    """

    seed: int
    choice: int
    _first: int = 0
    _draws: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __getitem__(self, index: int) -> float:
        if not self._first <= index < self._first + len(self._draws):
            block = index // _DRAWS
            key = np.array([self.seed % 2**64, self.choice % 2**64], dtype=np.uint64)
            # One count of Philox4x64 makes four numbers.
            counter = np.array([block * _DRAWS // 4, 0, 0, 0], dtype=np.uint64)
            raw = np.random.Philox(key=key, counter=counter).random_raw(_DRAWS)
            self._first, self._draws = block * _DRAWS, (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return float(self._draws[index - self._first])


class LiveRequest:
    """A request on its way: waiting (no row), prefilling (`fed` < `known`), decoding, or swapped out (no row again,
    `swapped` instead). One that decodes may be parked: its newest byte waits for stage `due`. Or its next byte is
    `held`, not drawn yet, since its constraint does not say yet which may come."""

    def __init__(self, request: Request, num_chunk_stages: int, now: float) -> None:
        self.request = request
        self.params = request.params
        self.arrival = 0  # the scheduler's count
        self.row: int | None = None
        self.swapped: Any = None
        self.due = 0  # 0: at stage 0, as long as it is not parked
        self.parked_tick, self.parked_at = 0, 0.0
        self.fed = 0  # bytes run through the model, while it prefills
        self.known = len(request.prompt)  # bytes to run before one is drawn: a prompt's, or forced ones at the end
        self.held: Any = None  # [V] the logits of a byte that is not drawn yet
        self.points: list[int] = []  # prompt bytes after which a snapshot is wanted, beside the usual ones
        self.leader: tuple[LiveRequest, int] | None = None  # who is reading that many leading bytes for both
        self.followers: dict[int, list[LiveRequest]] = {}
        self.pinned: Pinned | None = None  # where a leader has come to
        self.history = ChunkHistory()
        self.last_logits: Any = None  # [V] after the last byte that was fed, once finished
        self.output = bytearray()
        self.random = RandomStream(self.params.seed, self.params.choice)
        self.chunk_counts = [0] * num_chunk_stages
        self.finish_reason: FinishReason | None = None
        self._stop_reason: bytes | int | None = None
        self._error: str | None = None
        self._matcher = StopMatcher(self.params.stop)
        self.penalties = Penalties.asked_for(self.params, request.prompt)
        self._filter = ByteFilter.asked_for(self.params)
        self.structure = None if self.params.constraint is None else Structure(self.params.constraint)
        # Where EOS is not to end it but is a stop byte, it still does.
        self._ends_at_eos = not self.params.ignore_eos or EOS in self.params.stop_token_ids
        # [V] bytes that end it, or may: the last ones of stop strings.
        self.endings = np.zeros(VOCAB_SIZE, dtype=np.bool_)
        self.endings[[*self.params.stop_token_ids, *(stop[-1] for stop in self.params.stop)]] = True
        self.endings[EOS] |= self._ends_at_eos
        self._utf8_state = utf8.state_after(request.prompt) if self.params.utf8 == "strict" else utf8.START
        self._sent = 0  # output bytes handed out
        self._logprobs: list[ByteLogprobs] = []  # of output bytes not handed out yet
        self._prompt_logprobs: list[ByteLogprobs] = []
        self._chunks: list[Chunk] = []
        self._opened = 0
        self._cut = b""  # the stop string that ended the output
        self._cached = 0
        self._park_seconds = 0.0
        self._preemptions = 0
        self._started = False
        self._arrived, self._admitted, self._decoding = now, now, now

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def max_positions(self) -> int:
        """Most bytes, and so most chunks of any stage, that the request can feed: the last byte never is."""
        return max(len(self.request.prompt) + self.params.max_tokens - 1, len(self.request.prompt))

    @property
    def is_prefilling(self) -> bool:
        """Whether several bytes are to run before one is drawn."""
        return self.fed < self.known

    @property
    def is_reading(self) -> bool:
        """Whether bytes of the prompt are to run."""
        return self.fed < len(self.request.prompt)

    @property
    def mask_row(self) -> int:
        """Row of utf8.mask_table for the next byte."""
        return self.mask_row_ahead(0)

    @property
    def draws_plainly(self) -> bool:
        """Whether its next byte but one is drawn by numbers that are known now, whatever the next one is, but for the
        state of UTF-8 that leads to: nothing else that it asks for depends on the bytes before."""
        return self.structure is None and self.penalties is None and self._filter is None

    def mask_row_ahead(self, ahead: int) -> int:
        """Row of utf8.mask_table for the byte that comes `ahead` bytes after the next one, were UTF-8's state as it is
        now."""
        return self._mask_row(self.params.max_tokens - len(self.output) - ahead)

    def _mask_row(self, remaining: int) -> int:
        if self.params.utf8 == "raw":
            return utf8.ANY_BYTE
        return utf8.mask_row(self._utf8_state, max(remaining, 1), may_end=self._ends_at_eos)

    @property
    def allowed(self) -> NDArray[np.bool_] | None:
        """[V] the bytes that may come next, perhaps none; None where `mask_row` says it."""
        filters = self._filter is not None and not self._filter.is_over(len(self.output))
        if self.structure is None:
            return self._filtered(utf8.mask_table()[self.mask_row]) if filters else None
        remaining = self.params.max_tokens - len(self.output)
        if remaining >= utf8.LONGEST and self._ends_at_eos and not filters:
            return self.structure.mask  # which is of well-formed text
        return self._structured(remaining)

    def _structured(self, remaining: int) -> NDArray[np.bool_]:
        """[V] what the constraint and all else allow, with so many bytes to come."""
        assert self.structure is not None
        allowed = self.structure.mask & utf8.mask_table()[self._mask_row(remaining)]
        allowed[EOS] &= self._ends_at_eos
        return self._filtered(allowed, self.structure.permits)

    def _filtered(
        self, allowed: NDArray[np.bool_], permits: Callable[[bytes], bool] | None = None
    ) -> NDArray[np.bool_]:
        if self._filter is None:
            return allowed
        return self._filter.allowed(self.output, allowed, self._utf8_state, permits)

    @property
    def order(self) -> tuple[int, int]:
        """Whose turn is first, by priority and then by arrival."""
        return self.request.priority, self.arrival

    @property
    def reads_cache(self) -> bool:
        """Logits of all prompt bytes can only come from running them."""
        return self.params.prompt_logprobs is None

    def admit(self, row: int, now: float, snapshot: Snapshot | None = None) -> None:
        """Begins on `row`, behind the bytes of `snapshot` where one was put there."""
        self.row, self._started, self._admitted, self._decoding = row, True, now, now
        if snapshot is not None:
            self._cached = snapshot.length
            self.saw_chunks(list(snapshot.chunks))
            self.prefilled(snapshot.length, [], now)

    def want_snapshot(self, point: int) -> None:
        if point not in self.points:
            insort(self.points, point)

    def next_snapshot(self, interval: int | None) -> int:
        """Bytes after which the next snapshot is due; what is known ends there if none is before."""
        until = len(self.request.prompt)
        if self.fed >= until:
            return self.known
        later = next((point for point in self.points if point > self.fed), until)
        regular = until if interval is None else (self.fed // interval + 1) * interval
        return min(later, regular, until)

    def park(self, stage: int, tick: int, now: float) -> None:
        """The newest byte opened a chunk and waits for `stage`."""
        self.due, self.parked_tick, self.parked_at = stage, tick, now

    def unpark(self, now: float) -> float:
        """It waits no longer; returns the seconds it did."""
        waited = now - self.parked_at
        self.due = 0
        self._park_seconds += waited
        return waited

    def swap_out(self, swapped: Any, now: float) -> None:
        """Its row is another's; `due` stands."""
        if self.due:
            self._park_seconds += now - self.parked_at
        self.row, self.swapped = None, swapped
        self._preemptions += 1

    def swap_in(self, row: int, tick: int, now: float) -> None:
        self.row, self.swapped = row, None
        self.parked_tick, self.parked_at = tick, now

    def sequence(self, length: int) -> bytes:
        """The first `length` bytes of prompt and completion as they were fed, a stop string at the end with them."""
        return (self.request.prompt + self.output + self._cut)[:length]

    def piece(self, begin: int, end: int) -> bytes:
        """Bytes of the prompt, or of the completion, by their offsets."""
        length = len(self.request.prompt)
        return self.request.prompt[begin:end] if begin < length else bytes(self.output[begin - length : end - length])

    def prefilled(self, end: int, logprobs: list[ByteLogprobs], now: float) -> None:
        """Known bytes up to `end` have run; `logprobs` of the prompt bytes that they predicted."""
        was_reading = self.is_reading
        self.fed = end
        self._prompt_logprobs += logprobs
        if was_reading and not self.is_reading:
            self._decoding = now
            if self.params.max_tokens == 0:
                self.finish("length")

    def saw_chunks(self, chunks: list[Chunk]) -> None:
        self.history.add(chunks)
        for chunk in chunks:
            self.chunk_counts[chunk.stage - 1] += 1
            self._opened += chunk.stage == 1 and chunk.start >= len(self.request.prompt)
        if self.params.return_chunks:
            self._chunks += chunks

    def append(self, byte: int, logprobs: ByteLogprobs | None) -> None:
        """Takes the next byte of the completion and decides whether it was the last. Bytes that have to follow it are
        taken as well, where that is known already."""
        self._take(byte, logprobs)
        if self.structure is not None and self.finish_reason is None:
            self.structure.push(bytes((byte,)))
            if self.structure.ready:
                self._force(num_unfed=1)

    def settle(self) -> bool:
        """Does what the constraint leaves no choice about, once every byte so far has run: it ends, or bytes are taken
        that have to come. Returns whether nothing is to be drawn now."""
        structure = self.structure
        assert structure is not None
        if structure.error is not None:
            self.finish("error", error=f"the constraint {structure.error}")
        elif structure.has_ended:
            self._end()
        else:
            return self._force(num_unfed=0)
        return True

    def _force(self, num_unfed: int) -> bool:
        """Takes the bytes that have to come, to run them at once behind `num_unfed` others; returns whether there were
        any.

        They are left to draws where each byte's logits are asked for, and from one on that may end the completion:
        which bytes have run by then is never to depend on how early it was known that they come.
        """
        params, structure = self.params, self.structure
        assert structure is not None
        if structure.error is not None or params.logprobs is not None:
            return False
        forced = structure.forced[: max(params.max_tokens - len(self.output) - 1, 0)]
        if not forced:
            return False
        first = len(self.request.prompt) + len(self.output) - num_unfed
        taken, stops = bytearray(), self._matcher.copy()
        for byte in forced:
            ends = byte in params.stop_token_ids or stops.push(byte) is not None
            if ends or not self._may_follow(bytes(taken), byte):
                break
            self._take(byte, None)
            taken.append(byte)
        if not taken:
            return False
        structure.push(bytes(taken))
        if num_unfed + len(taken) > 1:
            self.fed, self.known = first, len(self.request.prompt) + len(self.output)
        return True

    def _may_follow(self, taken: bytes, byte: int) -> bool:
        """Whether a byte that the constraint asks for, behind others of its that were taken, may come for all else."""
        assert self.structure is not None
        permits = self.structure.permits
        only = np.zeros(VOCAB_SIZE, dtype=np.bool_)
        only[byte] = utf8.mask_table()[self.mask_row, byte]
        return bool(self._filtered(only, lambda coming: permits(taken + coming))[byte])

    def _end(self) -> None:
        self.finish("stop", stop_reason=EOS if self._ends_at_eos else None)

    def run_dry(self) -> None:
        """No byte may come: the end, where the constraint allows one or asks for a longer character than may come; an
        error otherwise."""
        if self.structure is not None and self.structure.may_end:
            self._end()
        elif self.structure is not None and self._structured(utf8.LONGEST).any():
            self.finish("length")
        else:
            self.finish("error", error=_NO_BYTE)

    def _take(self, byte: int, logprobs: ByteLogprobs | None) -> None:
        if byte == EOS and self._ends_at_eos:
            self.finish("stop", stop_reason=EOS)
            return
        is_stop_byte = byte in self.params.stop_token_ids
        if is_stop_byte and not self.params.include_stop_str_in_output:
            self.finish("stop", stop_reason=byte)
            return
        self.output.append(byte)
        if self.penalties is not None:
            self.penalties.push(byte)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if self.params.utf8 == "strict":
            following = utf8.advance(self._utf8_state, byte)
            assert following is not None, "the mask let a byte through that is not well-formed"
            self._utf8_state = following
        stop = self._matcher.push(byte)
        if stop is not None and len(self.output) <= self.params.min_tokens:
            self._matcher.pass_over()
            stop = None
        if is_stop_byte:
            self.finish("stop", stop_reason=byte)
        elif stop is not None and self.params.include_stop_str_in_output:
            self.finish("stop", stop_reason=stop)
        elif stop is not None:
            keep = len(self.output) - len(stop)
            self._cut = stop
            del self.output[keep:], self._logprobs[max(keep - self._sent, 0) :]
            self.finish("stop", stop_reason=stop)
        elif len(self.output) >= self.params.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, *, stop_reason: bytes | int | None = None, error: str | None = None) -> None:
        self.finish_reason, self._stop_reason, self._error = reason, stop_reason, error

    def take_output(self, now: float) -> Output | None:
        """What is new since the last call, or None; complete once finish_reason is set."""
        done = self.finish_reason is not None
        holds = not (done or self.params.include_stop_str_in_output)
        until = len(self.output) - (self._matcher.pending if holds else 0)
        if not (done or until > self._sent or self._chunks or (self._prompt_logprobs and not self.is_reading)):
            return None
        data = bytes(self.output[self._sent : until])
        output = Output(
            request_id=self.request_id,
            data=data,
            logprobs=tuple(self._logprobs[: len(data)]),
            prompt_logprobs=() if self.is_reading and not done else tuple(self._prompt_logprobs),
            chunks=tuple(sorted(self._chunks, key=lambda chunk: (chunk.start, chunk.stage))),
            opened=self._opened,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            error=self._error,
            usage=self._usage(now) if done else None,
        )
        self._sent = until
        del self._logprobs[: len(data)]
        self._chunks.clear()
        self._opened = 0
        if output.prompt_logprobs:
            self._prompt_logprobs.clear()
        return output

    def _usage(self, now: float) -> Usage:
        started = self._started
        waiting = now - self.parked_at if self.due and self.swapped is None else 0.0  # where it ends while parked
        return Usage(
            prompt_bytes=len(self.request.prompt),
            completion_bytes=len(self.output),
            chunks=tuple(self.chunk_counts),
            queue_seconds=(self._admitted if started else now) - self._arrived,
            prefill_seconds=(now if self.is_reading else self._decoding) - self._admitted if started else 0.0,
            decode_seconds=now - self._decoding if started and not self.is_reading else 0.0,
            cached_bytes=self._cached,
            park_seconds=self._park_seconds + waiting,
            preemptions=self._preemptions,
        )
