"""Who is let in: the gate every request to the model passes.

Knows the engine's state, whether the server drains, and how much is ahead; knows no model.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from hnet_runtime.engine.messages import EngineInfo
from server import errors
from server.engine_client import EngineClient
from server.settings import ServerSettings

MAX_RETRY_AFTER = 60  # seconds
LOADING_RETRY_AFTER = 5  # seconds
LEAST_WAIT = 0.1  # seconds; an answer that comes sooner than that comes too soon
RATE_SECONDS = 10.0  # time over which the engine's speed is averaged


class Rate:
    """Bytes a second, averaged over RATE_SECONDS of work; 0 while unknown."""

    def __init__(self) -> None:
        self.value = 0.0
        self._last = self._total = 0  # noted last, and when the span under way began
        self._since = time.monotonic()

    def begin(self) -> None:
        """Work comes after none: the idle time before it does not count."""
        self._total, self._since = self._last, time.monotonic()

    def note(self, total: int, now: float) -> None:
        """So many bytes have been done in all (called once a tick)."""
        self._last = total
        elapsed = now - self._since
        if elapsed >= 0.25:
            share = min(1.0, elapsed / RATE_SECONDS)
            if total > self._total:  # an idle engine says nothing about its speed
                self.value += (share if self.value else 1.0) * ((total - self._total) / elapsed - self.value)
            self._total, self._since = total, now


class Backlog:
    """How much work is ahead, and how fast it goes: bytes to read and to write, bytes a second.

    A prompt is ahead until its first byte comes. Input that makes every byte a chunk slows the rates, and so counts.
    """

    def __init__(self) -> None:
        self._bytes: dict[str, tuple[int, int]] = {}  # to read, to write at most
        self._ahead = 0  # both, of all
        self.unread = 0  # bytes of prompts
        self._all = Rate()
        self._reading = Rate()

    def add(self, request_id: str, unread: int, unwritten: int) -> None:
        if not self._bytes:
            self._all.begin()
            self._reading.begin()
        self._bytes[request_id] = unread, unwritten
        self._ahead += unread + unwritten
        self.unread += unread

    def has_read(self, request_id: str) -> None:
        """The request's prompt has been read."""
        unread, unwritten = self._bytes[request_id]
        self._bytes[request_id] = 0, unwritten
        self._ahead -= unread
        self.unread -= unread

    def remove(self, request_id: str) -> None:
        unread, unwritten = self._bytes.pop(request_id, (0, 0))
        self._ahead -= unread + unwritten
        self.unread -= unread

    def progress(self, read: int, written: int, now: float) -> None:
        """Notes that so many bytes have been read and written in all (called once a tick)."""
        self._all.note(read + written, now)
        self._reading.note(read, now)

    @property
    def seconds(self) -> float:
        """Until the work that is ahead is done, were nothing more to come; requests may end earlier."""
        return self._ahead / self._all.value if self._all.value else 0.0

    def seconds_to_read(self, num_bytes: int) -> float:
        """What reading so many bytes of prompts takes."""
        return num_bytes / self._reading.value if self._reading.value else 0.0


REASONS = ("slow_down", "server_is_overloaded", "loading", "engine_down", "shutting_down")
"""The codes with which a request is turned away."""


class Admission:
    """Lets a request in or raises the ApiError that turns it away, and counts those by its code."""

    def __init__(self, client: EngineClient, backlog: Backlog, settings: ServerSettings) -> None:
        self._client = client
        self._backlog = backlog
        self._max_waiting = settings.max_waiting_requests
        self._max_waiting_bytes = settings.max_waiting_bytes
        self._drain_timeout = settings.drain_timeout
        self.draining = False
        self.rejections: Counter[str] = Counter()

    @property
    def unread(self) -> int:
        """Bytes of prompts that wait to be read or are being read."""
        return self._backlog.unread

    def check(self, num_requests: int = 1) -> None:
        """Raises ApiError (429, 503) unless the engine can take `num_requests` more."""
        if self.draining:
            raise self._turn_away(errors.shutting_down(self._seconds(self._drain_timeout)))
        info = self.check_loaded()
        if self._client.state != "ready":
            raise self._engine_down()
        if self._client.num_live + num_requests > info.max_num_seqs + self._max_waiting:
            raise self._overload(errors.slow_down, self._backlog.seconds)
        # What waits counts, not what comes: so a prompt longer than the limit is served when nothing waits.
        if self._max_waiting_bytes is not None and self._backlog.unread >= self._max_waiting_bytes:
            over = self._backlog.unread - self._max_waiting_bytes + 1
            raise self._overload(errors.server_is_overloaded, self._backlog.seconds_to_read(over))

    def check_loaded(self) -> EngineInfo:
        """Raises ApiError (503) unless the engine has said what it serves."""
        if self._client.info is None:
            if self._client.state == "loading":
                raise self._turn_away(errors.loading(LOADING_RETRY_AFTER))
            raise self._engine_down()
        return self._client.info

    def _engine_down(self) -> errors.ApiError:
        wait = min(MAX_RETRY_AFTER, self._client.seconds_to_restart)
        return self._turn_away(errors.engine_down(self._seconds(wait)))

    def _overload(self, kind: Callable[[int], errors.ApiError], wait: float) -> errors.ApiError:
        """`wait` in seconds, 0 where no rate is known; OpenAI's clients read it in milliseconds where they can."""
        error = kind(self._seconds(wait))
        exact = min(MAX_RETRY_AFTER, max(LEAST_WAIT, wait)) if wait else 1.0
        error.headers["retry-after-ms"] = str(round(exact * 1000))
        return self._turn_away(error)

    def _turn_away(self, error: errors.ApiError) -> errors.ApiError:
        assert error.code is not None
        self.rejections[error.code] += 1
        return error

    @staticmethod
    def _seconds(seconds: float) -> int:
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))
