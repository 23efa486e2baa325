"""The API keys: everything but the probes asks for one, where any is set. Pure ASGI."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import unauthorized
from server.files import WatchedFiles, read_keys

PROBES = frozenset({"/health", "/ready"})


class KeyRing:
    """The keys that open the server: some for good, and those of a file, which is read again when it changes.

    A file that cannot be read any more or holds no key leaves the last ones in force and is logged; raises ValueError,
    as `read_keys` does, where there are no last ones yet.
    """

    def __init__(self, keys: Iterable[str], file: str | None = None) -> None:
        self._fixed = [_digest(key.strip().encode()) for key in keys]
        self._digests = self._fixed
        self._file = None if file is None else WatchedFiles([file], partial(self._take, file))

    def knows(self, key: bytes) -> bool:
        """Whether a key is one of ours; takes the same time whichever it is and however nearly it is one."""
        if self._file is not None:
            self._file.look()
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found

    def _take(self, file: str) -> str:
        self._digests = [*self._fixed, *(_digest(key.encode()) for key in read_keys(file))]
        return f"{len(self._digests)} API keys are in force"


class ApiKey:
    """Lets a request pass that carries `Authorization: Bearer KEY` with a key of the ring."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, metrics_public: bool = False) -> None:
        self._app = app
        self._keys = keys
        self._public = PROBES | {"/metrics"} if metrics_public else PROBES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public and not self._knows_key(scope):
            await unauthorized().send(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are read as Latin-1; so a key of other characters arrives as the bytes it was sent in.
        return self._keys.knows(key.strip().encode("latin-1")) and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing tells nothing of theirs."""
    return hashlib.sha256(key).digest()
