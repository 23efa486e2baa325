from __future__ import annotations

import time
from typing import Any

from server.app import build_service
from server.engine_client import EngineClient
from server.probes import MAX_HEARTBEAT_AGE, unready
from server.service import Service
from server.settings import ServerSettings


class Nothing:
    """A transport that leads nowhere."""

    def start(self, on_message: Any, on_exit: Any) -> None:
        pass

    def send(self, message: Any) -> None:
        pass

    async def stop(self, timeout: float) -> bool:
        return True


def ready_service() -> tuple[Service, EngineClient]:
    service, _ = build_service(ServerSettings(), Nothing())
    service.client.state = "ready"
    return service, service.client


def test_an_engine_that_was_heard_of_lately_is_ready() -> None:
    service, _ = ready_service()
    assert unready(service) is None


def test_an_engine_that_is_silent_is_not() -> None:
    service, client = ready_service()
    client._heard = time.monotonic() - MAX_HEARTBEAT_AGE - 1
    assert str(unready(service)).startswith("engine has been silent for")


def test_each_reason_is_told() -> None:
    service, client = ready_service()
    client.state = "loading"
    assert unready(service) == "loading"
    client.state, client.failure = "failed", "out of memory"
    assert unready(service) == "engine failed: out of memory"
    client.state = "restarting"
    assert unready(service) == "engine failed: out of memory; it is being started again"
    service.admission.draining = True
    assert unready(service) == "shutting down"
