"""Several observers of the engine's client as one. Knows nothing of what they do with what they are told."""

from __future__ import annotations

from hnet_runtime.engine.messages import FinishReason, Request, Tick, Usage
from server.engine_client import Observer


class Observers:
    """Tells each of them in turn (see `engine_client.Observer`)."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def submitted(self, request: Request, now: float) -> None:
        for observer in self._observers:
            observer.submitted(request, now)

    def tick(self, tick: Tick, now: float) -> None:
        for observer in self._observers:
            observer.tick(tick, now)

    def finished(self, request_id: str, reason: FinishReason, usage: Usage | None, now: float) -> None:
        for observer in self._observers:
            observer.finished(request_id, reason, usage, now)

    def engine_ended(self) -> None:
        for observer in self._observers:
            observer.engine_ended()
