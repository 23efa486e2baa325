"""One streamed answer as its client saw it: what came, when, and whether it came whole.

Knows server-sent events and the shapes of completions and chats; no sockets and no clock of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

Outcome = Literal["complete", "aborted", "rejected", "failed", "broken", "unfinished", "unsent"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass
class Record:
    """What became of one request; times are of the machine's monotonic clock, in seconds.

    outcome: complete; aborted, by the client and on purpose; rejected, with 429 or 503; failed, with another status or
    an error in words; broken, which ended without its end or told a wrong count; unfinished, when the client stopped
    waiting; unsent, since too many of the client's own were open. arrivals: (when, bytes of text so far), by event.
    """

    kind: str
    variant: int
    due: float
    sent: float = 0.0
    end: float = 0.0
    outcome: Outcome = "unsent"
    status: int = 0
    retry_after: str | None = None
    reason: str | None = None  # of its finish, or the code of an error
    detail: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    text: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first_byte(self) -> float | None:
        """Seconds from when it was due."""
        return self.arrivals[0][0] - self.due if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between an event with text and the next."""
        times = [when for when, _ in self.arrivals]
        return [after - before for before, after in pairwise(times)]

    @property
    def num_bytes(self) -> int:
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def rate(self) -> float | None:
        """Bytes a second after the first event; None where no more than one came."""
        if len(self.arrivals) < 2:
            return None
        return (self.num_bytes - self.arrivals[0][1]) / max(self.arrivals[-1][0] - self.arrivals[0][0], 1e-9)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Record:
        document = json.loads(line)
        return cls(**{**document, "arrivals": [(when, so_far) for when, so_far in document["arrivals"]]})


class StreamReader:
    """Puts what comes of a stream into its record.

    counts_bytes: the usage counts bytes, so that it has to agree with the text.
    """

    def __init__(self, record: Record, *, counts_bytes: bool) -> None:
        self._record = record
        self._counts_bytes = counts_bytes
        self._rest = b""
        self._pieces: list[str] = []
        self._faults: list[str] = []
        self._is_done = False
        self._error: dict[str, Any] | None = None

    @property
    def is_done(self) -> bool:
        return self._is_done

    def feed(self, data: bytes, now: float) -> None:
        """Takes bytes of the body as they came, cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line.removeprefix(b"data:").strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if self._is_done:
            self._faults.append("an event came after [DONE]")
        elif data == b"[DONE]":
            self._is_done = True
        else:
            try:
                self._document(json.loads(data), now)
            except (ValueError, KeyError, TypeError) as error:
                self._faults.append(f"an event is none: {error!r}: {data[:80]!r}")

    def _document(self, document: dict[str, Any], now: float) -> None:
        record = self._record
        if "error" in document:
            self._error = document["error"]
            return
        for choice in document["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if text:
                if record.reason is not None:
                    self._faults.append("text came after the end")
                self._pieces.append(text)
                record.arrivals.append((now, record.num_bytes + len(text.encode())))
            if choice.get("finish_reason") is not None:
                if record.reason is not None:
                    self._faults.append("it ended twice")
                record.reason = choice["finish_reason"]
        if usage := document.get("usage"):
            record.prompt_tokens, record.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]

    def close(self, now: float, outcome: Outcome | None = None) -> None:
        """The stream is over; outcome: why, where the client ended it."""
        record = self._record
        record.end, record.text = now, "".join(self._pieces)
        if self._error is not None:
            record.outcome, record.reason = "failed", str(self._error.get("code"))
            record.detail = str(self._error.get("message"))
            return
        if outcome is None:
            self._faults += self._missing()
        if self._faults:
            record.outcome, record.detail = "broken", "; ".join(self._faults)
        else:
            record.outcome = outcome or "complete"

    def _missing(self) -> list[str]:
        record = self._record
        faults = [] if self._is_done else ["no [DONE] came"]
        if record.reason is None:
            faults.append("no finish_reason came")
        told = record.completion_tokens
        if told is None:
            faults.append("no usage came")
        # A stop string is counted and not shown, so text may be shorter there.
        elif self._counts_bytes and (told < record.num_bytes or (told > record.num_bytes and record.reason != "stop")):
            faults.append(f"its usage says {told} bytes, and {record.num_bytes} came")
        return faults
