"""One choice of a response, built from what the engine says of one row.

Knows text, log-probabilities and chunks as OpenAI and vLLM lay them out; knows no HTTP and no
engine. A whole response and an event of a stream are the same thing here: `take` gives what
came since the last call, so the events of a stream add up to the response by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hnet_runtime.config import BOS
from hnet_runtime.engine.messages import ByteLogprobs, Chunk, FinishReason, Output, Usage
from server.text import BYTE_KEYS, TOKEN_ID_KEYS, TextDecoder, character_indices, incomplete_tail

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


@dataclass(frozen=True)
class ChoiceOptions:
    """What a request wants to see of each of its choices."""

    echo: bool = False
    logprobs: int | None = None
    strict: bool = True
    return_token_ids: bool = False
    return_chunks: bool = False
    token_id_keys: bool = False
    stream_interval: int = 1
    prompt_logprobs: int | None = None


class Choice:
    """Takes Outputs of one row in (`add`), gives choice objects out (`take`)."""

    def __init__(self, index: int, prompt: bytes, options: ChoiceOptions) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.error: str | None = None
        self.num_bytes = 0  # completed so far
        self._logprob = 0.0  # of all of them together, where they come with log-probabilities
        self._prompt = prompt
        self._options = options
        self._keys = TOKEN_ID_KEYS if options.token_id_keys else BYTE_KEYS
        self._first = True
        self._stop_reason: str | int | None = None
        self._decoder = TextDecoder()
        self._text: list[str] = []
        self._characters = 0  # of the text given out
        self._held = bytearray()  # completed bytes not given out
        self._logprobs: list[ByteLogprobs] = []  # of the held bytes
        self._chunks: list[Chunk] = []
        self._prompt_logprobs: list[ByteLogprobs] = []
        # What of the prompt is part of the text: all of it, or the beginning of a character that the completion ends.
        self._shown = prompt[1:] if prompt[:1] == bytes((BOS,)) else prompt
        self._lead = self._shown if options.echo else incomplete_tail(self._shown) if options.strict else b""
        self._text.append(self._decoder.feed(self._lead))
        self._context = self._lead  # bytes before the held ones that their characters may have begun with

    @property
    def prompt_length(self) -> int:
        """Bytes of the prompt, BOS included."""
        return len(self._prompt)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the prompt that came from the prefix cache; 0 until the row has ended and says so."""
        return 0 if self.usage is None else self.usage.cached_bytes

    @property
    def mean_logprob(self) -> float:
        """Of its bytes, where they came with log-probabilities; least of all where there are none or it failed."""
        return self._logprob / self.num_bytes if self.num_bytes and self.error is None else -math.inf

    def add(self, output: Output) -> None:
        """Takes what the row gained."""
        self._held += output.data
        self.num_bytes += len(output.data)
        self._text.append(self._decoder.feed(output.data))
        self._logprobs += output.logprobs
        self._logprob += sum(entry.logprob for entry in output.logprobs)
        self._prompt_logprobs += output.prompt_logprobs
        self._chunks += output.chunks
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.usage = output.usage
            self.error = output.error
            reason = output.stop_reason
            self._stop_reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else reason
            self._text.append(self._decoder.finish(drop_incomplete=self._options.strict))

    def take(self) -> dict[str, Any] | None:
        """The choice object of what came since the last call; None where there is nothing to show yet.

        Only whole characters are shown, with what belongs to their bytes; at the end, all of it.
        """
        options = self._options
        ended = self.finish_reason is not None
        text = "".join(self._text)
        ready = len(self._held) if ended else max(0, len(self._held) - len(self._decoder.pending))
        if not ended and (not text or ready < self._least()):
            return None
        self._text.clear()
        data = bytes(self._held[:ready])
        del self._held[:ready]
        choice: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": None if options.logprobs is None else self._logprob_arrays(data, options.logprobs),
            "finish_reason": self.finish_reason,
            "stop_reason": self._stop_reason,
        }
        if options.return_token_ids:
            choice["token_ids"] = list(data)
            if self._first:
                choice["prompt_token_ids"] = list(self._prompt)
        if options.return_chunks:
            self._chunks.sort(key=lambda chunk: (chunk.start, chunk.stage))
            choice["chunks"] = [{"stage": chunk.stage, "start": chunk.start, "p": chunk.p} for chunk in self._chunks]
            self._chunks.clear()
        if options.prompt_logprobs is not None and self._first:
            choice["prompt_logprobs"] = self._prompt_entries(options.prompt_logprobs)
        if self.error is not None:
            choice["error"] = self.error
        self._characters += len(text)
        self._context = self._decoder.pending[: -len(self._held) or None]
        self._first = False
        return choice

    def _least(self) -> int:
        """Completed bytes that are worth an event. The first one carries an echoed prompt, once it is scored."""
        if not (self._first and self._options.echo):
            return self._options.stream_interval
        scored = self._options.logprobs is None or len(self._prompt_logprobs) >= len(self._prompt) - 1
        return 0 if scored else len(self._held) + 1

    def _logprob_arrays(self, data: bytes, alternatives: int) -> dict[str, list[Any]]:
        """OpenAI's parallel arrays for `data`, an echoed prompt before it, plus `token_ids` and `bytes`."""
        context = self._context
        offsets = [self._characters + index for index in character_indices(context + data)]
        entries: list[ByteLogprobs | None] = list(self._logprobs[: len(data)])
        del self._logprobs[: len(data)]
        tokens = data
        if self._first and self._options.echo:
            tokens = self._prompt + data
            offsets = [0] * (len(self._prompt) - len(context)) + offsets  # BOS has no character
            missing = len(self._prompt) - 1 - len(self._prompt_logprobs)  # of a row that ended before it was scored
            entries = [None, *self._prompt_logprobs, *[None] * missing, *entries]
        else:
            offsets = offsets[len(context) :]
        keys = self._keys
        return {
            "tokens": [keys[byte] for byte in tokens],
            "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST_LOGPROB) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry, alternatives) for entry in entries],
            "text_offset": offsets,
            "token_ids": list(tokens),
            "bytes": [[byte] for byte in tokens],
        }

    def _prompt_entries(self, alternatives: int) -> list[dict[str, dict[str, Any]] | None]:
        """vLLM's: for each byte of the prompt the most probable ones and itself by their numbers; null for the first
        byte, and where the row ended before it was scored."""
        keys = self._keys
        entries: list[dict[str, dict[str, Any]] | None] = [None]
        for entry in self._prompt_logprobs:
            ranked = [(rank, *pair) for rank, pair in enumerate(entry.top[:alternatives], start=1)]
            if all(byte != entry.byte for _, byte, _ in ranked):
                ranked.append((entry.rank, entry.byte, entry.logprob))
            entries.append(
                {
                    str(byte): {"logprob": max(logprob, LOWEST_LOGPROB), "rank": rank, "decoded_token": keys[byte]}
                    for rank, byte, logprob in ranked
                }
            )
        return entries + [None] * (len(self._prompt) - len(entries))

    def _top(self, entry: ByteLogprobs, alternatives: int) -> dict[str, float]:
        keys = self._keys
        top = {keys[byte]: max(logprob, LOWEST_LOGPROB) for byte, logprob in entry.top[:alternatives]}
        top.setdefault(keys[entry.byte], max(entry.logprob, LOWEST_LOGPROB))
        return top
