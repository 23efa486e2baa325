"""What a request asks of its next byte beyond temperature and cuts: other logits, and fewer bytes to choose from.

Both follow from its parameters and its bytes alone. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from hnet_runtime.config import EOS, VOCAB_SIZE
from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import SamplingParams

_LARGEST = float(np.finfo(np.float32).max)


class Penalties:
    """Logits after what has come: `logit_bias`, then the repetition penalty, then those of frequency and presence."""

    def __init__(self, params: SamplingParams, prompt: bytes) -> None:
        self._repetition = params.repetition_penalty
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._bias = np.zeros(VOCAB_SIZE)
        for byte, bias in params.logit_bias:
            self._bias[byte] = bias
        self._counts = np.zeros(VOCAB_SIZE, dtype=np.int64)  # of the completion
        self._seen = np.zeros(VOCAB_SIZE, dtype=np.bool_)  # in prompt or completion
        self._seen[np.frombuffer(prompt, dtype=np.uint8)] = True

    @classmethod
    def asked_for(cls, params: SamplingParams, prompt: bytes) -> Penalties | None:
        """None where the logits are to stay as they are."""
        neutral = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
        return None if neutral and not params.logit_bias else cls(params, prompt)

    def push(self, byte: int) -> None:
        """The completion has gained a byte."""
        self._counts[byte] += 1
        self._seen[byte] = True

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """[V] → [V] anew: reckoned in fp64, rounded once, and finite. Logits that are not finite stay as they are."""
        if not np.isfinite(logits).all():
            return logits
        wide = logits.astype(np.float64) + self._bias
        if self._repetition != 1.0:
            with np.errstate(over="ignore"):
                penalised = np.where(wide > 0, wide / self._repetition, wide * self._repetition)
            wide = np.where(self._seen, penalised, wide)
        wide -= self._counts * self._frequency + (self._counts > 0) * self._presence
        return np.clip(wide, -_LARGEST, _LARGEST).astype(np.float32)


class ByteFilter:
    """Which bytes may come next: `allowed_token_ids`, `bad_words`, `min_tokens` and well-formedness at once.

    In strict mode no character is begun that the others would not let end, be it by its last byte or by a stop byte.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._is_strict = params.utf8 == "strict"
        self._min_tokens = params.min_tokens
        self._stops = frozenset(params.stop_token_ids)
        self._may_come = np.full(VOCAB_SIZE, params.allowed_token_ids is None)
        self._may_come[list(params.allowed_token_ids or ())] = True
        self._may_come[[word[0] for word in params.bad_words if len(word) == 1]] = False
        self._may_come_early = self._may_come.copy()  # before `min_tokens` bytes
        self._may_come_early[list(self._stops if params.ignore_eos else self._stops | {EOS})] = False
        self._lasts = params.allowed_token_ids is not None or bool(params.bad_words)
        self._cuts = [cut for word in params.bad_words for cut in _cuts(word)]
        # Whether any character that has begun may go on as it likes, as far as single bytes are concerned.
        self._continues = bool(self._may_come_early[0x80:0xC0].all())
        self._dead_ends_early = _dead_ends(self._may_come_early, frozenset())
        self._dead_ends = _dead_ends(self._may_come, self._stops)

    @classmethod
    def asked_for(cls, params: SamplingParams) -> ByteFilter | None:
        """None where well-formedness alone decides, and so a row of utf8.mask_table."""
        if params.allowed_token_ids is None and not params.bad_words and not params.min_tokens:
            return None
        # The choices of one request share theirs.
        return _filter(
            SamplingParams(
                allowed_token_ids=params.allowed_token_ids,
                bad_words=params.bad_words,
                min_tokens=params.min_tokens,
                stop_token_ids=params.stop_token_ids,
                ignore_eos=params.ignore_eos,
                utf8=params.utf8,
            )
        )

    def is_over(self, length: int) -> bool:
        """Whether it says nothing more once the completion has `length` bytes."""
        return not self._lasts and length >= self._min_tokens

    def allowed(
        self,
        output: bytes | bytearray,
        well_formed: NDArray[np.bool_],
        state: int,
        permits: Callable[[bytes], bool] | None = None,
    ) -> NDArray[np.bool_]:
        """[V] the bytes of `well_formed` that may follow `output`, which ends in `state` of utf8; perhaps none.

        permits: whether a constraint lets several bytes come, one after the other; which may be the first of them
        `well_formed` says as well.
        """
        banned: dict[bytes, set[int]] = {}  # after what comes next, the bytes that would complete a bad word
        for before, between, last in self._cuts:
            if output.endswith(before):
                banned.setdefault(between, set()).add(last)
        length = len(output)
        allowed: NDArray[np.bool_] = well_formed & self._at(length)
        allowed[list(banned.get(b"", ()))] = False
        if self._is_strict:
            doubtful = {between[0] for between in banned if between}
            if length >= self._min_tokens:
                allowed[self._dead_ends[state]] = False
            elif length + utf8.LONGEST <= self._min_tokens:
                allowed[self._dead_ends_early[state]] = False
            else:  # a stop byte may come in time
                doubtful.update(self._dead_ends_early[state])
            if permits is not None and (doubtful or not self._continues):
                doubtful.update(byte for byte, following in utf8.followers(state) if following != utf8.START)
            for byte in doubtful:
                following = utf8.advance(state, byte)
                if allowed[byte] and following is not None and byte not in self._stops:
                    allowed[byte] = self._can_end(following, bytes((byte,)), length + 1, banned, permits)
        return allowed

    def _at(self, length: int) -> NDArray[np.bool_]:
        return self._may_come if length >= self._min_tokens else self._may_come_early

    def _can_end(
        self,
        state: int,
        coming: bytes,
        length: int,
        banned: dict[bytes, set[int]],
        permits: Callable[[bytes], bool] | None,
    ) -> bool:
        """Whether a character in `state` can be finished, once `coming` has come and the completion has `length`."""
        if state == utf8.START:
            return True
        may_come, completing = self._at(length), banned.get(coming, ())
        return any(
            may_come[byte]
            and byte not in completing
            and (permits is None or permits(coming + bytes((byte,))))
            and (byte in self._stops or self._can_end(following, coming + bytes((byte,)), length + 1, banned, permits))
            for byte, following in utf8.followers(state)
        )


def _cuts(word: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """A word as what has come, what comes of the same character before its last byte, and that last byte, cut in every
    way in which these may belong to one character."""
    yield word[:-1], b"", word[-1]
    for end in range(len(word) - 2, max(len(word) - 1 - utf8.LONGEST, -1), -1):
        if word[end] < 0x80:
            return
        yield word[:end], word[end:-1], word[-1]
        if word[end] >= 0xC0:  # a character begins there
            return


def _dead_ends(may_come: NDArray[np.bool_], stops: frozenset[int]) -> dict[int, list[int]]:
    """By state of utf8, the bytes behind which a character could not end, were those that may come always the same."""
    coming = set(np.flatnonzero(may_come).tolist())

    @cache
    def can_end(state: int) -> bool:
        return state == utf8.START or any(
            byte in coming and (byte in stops or can_end(following)) for byte, following in utf8.followers(state)
        )

    return {
        state: [byte for byte, following in utf8.followers(state) if byte not in stops and not can_end(following)]
        for state in utf8.STATES
    }


@lru_cache(maxsize=16)
def _filter(params: SamplingParams) -> ByteFilter:
    return ByteFilter(params)
