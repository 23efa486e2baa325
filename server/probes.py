"""`/health`, `/ready`, `/version`: what orchestrators ask."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

import hnet_runtime
from server.responses import Shape
from server.service import Service

MAX_HEARTBEAT_AGE = 10.0  # seconds; an engine without work speaks every second, one with work after every tick

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


class Status(Shape):
    status: str


@router.get("/ready", responses={503: {"model": Status, "description": "Not ready; `status` says why."}})
async def ready(request: Request) -> JSONResponse:
    """Whether the server should be sent requests: the engine is loaded, makes progress and is not draining."""
    reason = unready(request.app.state.service)
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": hnet_runtime.__version__}


def unready(service: Service) -> str | None:
    """Why the server should not be sent requests; None where it should."""
    client = service.client
    if service.admission.draining:
        return "shutting down"
    if client.state == "loading":
        return "loading"
    if client.state == "restarting":
        return f"engine failed: {client.failure}; it is being started again"
    if client.state != "ready":
        return f"engine failed: {client.failure}" if client.failure else "engine stopped"
    if client.heartbeat_age > MAX_HEARTBEAT_AGE:
        return f"engine has been silent for {client.heartbeat_age:.1f} s"
    return None
