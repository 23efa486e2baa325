"""The API key: everything but the probes asks for it, where one is set. Pure ASGI."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import unauthorized

PROBES = frozenset({"/health", "/ready"})


class ApiKey:
    """Lets a request pass that carries `Authorization: Bearer KEY`; compares in constant time."""

    def __init__(self, app: ASGIApp, key: str, *, metrics_public: bool = False) -> None:
        self._app = app
        self._key = key.encode()
        self._public = PROBES | {"/metrics"} if metrics_public else PROBES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public and not self._knows_key(scope):
            await unauthorized().send(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are read as Latin-1; so a key of other characters arrives as the bytes it was sent in.
        return hmac.compare_digest(key.strip().encode("latin-1"), self._key) and scheme.lower() == "bearer"
