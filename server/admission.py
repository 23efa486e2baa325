"""Who is let in: the gate every request to the model passes.

Knows the engine's state, whether the server drains, and how much is ahead; knows no model.
"""

from __future__ import annotations

import math
import time
from collections import Counter

from hnet_runtime.engine.messages import EngineInfo
from server import errors
from server.engine_client import EngineClient

MAX_RETRY_AFTER = 60  # seconds
LOADING_RETRY_AFTER = 5  # seconds
RATE_SECONDS = 10.0  # time over which the engine's speed is averaged


class Backlog:
    """How much work is ahead, and how fast it goes: bytes to read and to write, bytes a second."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._rate = 0.0
        self._total = 0
        self._since = time.monotonic()

    def add(self, request_id: str, num_bytes: int) -> None:
        self._bytes[request_id] = num_bytes

    def remove(self, request_id: str) -> None:
        self._bytes.pop(request_id, None)

    def progress(self, total: int, now: float) -> None:
        """Notes that the engine has done `total` bytes since it began (called once a tick)."""
        elapsed = now - self._since
        if elapsed >= 0.25:
            share = min(1.0, elapsed / RATE_SECONDS)
            if total > self._total:  # an idle engine says nothing about its speed
                self._rate += (share if self._rate else 1.0) * ((total - self._total) / elapsed - self._rate)
            self._total, self._since = total, now

    @property
    def seconds(self) -> float:
        """Until the work that is ahead is done, were nothing more to come; requests may end earlier."""
        return sum(self._bytes.values()) / self._rate if self._rate else 0.0


class Admission:
    """Lets a request in or raises the ApiError that turns it away, and counts those by reason."""

    def __init__(self, client: EngineClient, backlog: Backlog, max_waiting: int, drain_timeout: float) -> None:
        self._client = client
        self._backlog = backlog
        self._max_waiting = max_waiting
        self._drain_timeout = drain_timeout
        self.draining = False
        self.rejections: Counter[str] = Counter()

    def check(self, num_requests: int = 1) -> None:
        """Raises ApiError (429, 503) unless the engine can take `num_requests` more."""
        if self.draining:
            raise self._turn_away("shutting_down", errors.shutting_down(self._seconds(self._drain_timeout)))
        info = self.check_loaded()
        if self._client.state != "ready":
            raise self._turn_away("engine_down", errors.engine_down(MAX_RETRY_AFTER))
        if self._client.num_live + num_requests > info.max_num_seqs + self._max_waiting:
            raise self._turn_away("slow_down", errors.slow_down(self._seconds(self._backlog.seconds)))

    def check_loaded(self) -> EngineInfo:
        """Raises ApiError (503) unless the engine has said what it serves."""
        if self._client.info is None:
            if self._client.state == "loading":
                raise self._turn_away("loading", errors.loading(LOADING_RETRY_AFTER))
            raise self._turn_away("engine_down", errors.engine_down(MAX_RETRY_AFTER))
        return self._client.info

    def _turn_away(self, reason: str, error: errors.ApiError) -> errors.ApiError:
        self.rejections[reason] += 1
        return error

    @staticmethod
    def _seconds(seconds: float) -> int:
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))
