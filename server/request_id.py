"""A name for every request: taken from the client or made here, echoed, logged.

Pure ASGI, the outermost layer: whatever fails below, the client gets an answer of OpenAI's
shape with the id, and the log gets a line with it.
"""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import internal

MAX_LENGTH = 128
QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked all the time; logged at debug level

access_log = logging.getLogger("hnet.access")
log = logging.getLogger("hnet.server")


class RequestIds:
    """Gives `scope["state"]["request_id"]` to everything below and `x-request-id` to every response, unless a proxy in
    front does."""

    def __init__(self, app: ASGIApp, *, in_responses: bool = True) -> None:
        self._app, self._in_responses = app, in_responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = acceptable(Headers(scope=scope).get("x-request-id")) or secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.perf_counter()
        status: int | None = None

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] == "http.response.start" and self._in_responses:
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            log.exception("request %s failed", request_id)
            if status is None:
                await internal(request_id).send(scope, receive, named)
        finally:
            took = (time.perf_counter() - began) * 1000
            path = ascii(scope["path"])[1:-1]
            level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
            access_log.log(level, "%s %s %s %.1f ms id=%s", scope["method"], path, status or "-", took, request_id)


def acceptable(value: str | None) -> str | None:
    """The id as it is where it is 1–128 printable ASCII characters, else None."""
    if value and len(value) <= MAX_LENGTH and value.isascii() and value.isprintable():
        return value
    return None
