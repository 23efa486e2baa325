"""One request of a scenario sent to a server, and its stream read as it comes.

Plain sockets, one connection a request: what it costs to connect is part of the time to the first byte.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from loadtests.scenario import Asked
from loadtests.stream import Record, StreamReader

SILENCE = 120.0  # seconds after which a stream is given up
READ_BYTES = 65536
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def headers() -> dict[str, str]:
    """With the key of HNET_API_KEY, where there is one."""
    key = os.environ.get("HNET_API_KEY", "").split(",")[0]
    return {"Authorization": f"Bearer {key}"} if key else {}


def connect(url: str) -> HTTPConnection:
    """A connection to the server at an http:// or https:// address."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return HTTPSConnection(parts.hostname or "", parts.port, timeout=SILENCE, context=ssl.create_default_context())
    return HTTPConnection(parts.hostname or "", parts.port, timeout=SILENCE)


def ask(
    url: str, asked: Asked, record: Record, *, salt: str, peer: str | None = None, abort_after: int | None = None
) -> None:
    """Sends one request and reads its answer into `record`, to its end or until `abort_after` bytes have come."""
    reader = StreamReader(record, counts_bytes=peer is None)
    connection = connect(url)
    record.sent = time.monotonic()
    try:
        body = json.dumps(asked.body(salt=salt, peer=peer))
        connection.request("POST", PATHS[asked.endpoint], body, {"Content-Type": "application/json", **headers()})
        response = connection.getresponse()
        record.status, record.retry_after = response.status, response.getheader("Retry-After")
        if response.status != 200:
            _refused(record, response.read(READ_BYTES))
            return
        while data := response.read1(READ_BYTES):
            reader.feed(data, time.monotonic())
            if abort_after is not None and record.num_bytes >= abort_after and not reader.is_done:
                reader.close(time.monotonic(), "aborted")
                return
        reader.close(time.monotonic())
    except (OSError, HTTPException) as error:
        reader.close(time.monotonic(), "failed")
        record.detail = repr(error)
    except BaseException:  # the client itself is ended
        reader.close(time.monotonic(), "unfinished")
        raise
    finally:
        connection.close()


def _refused(record: Record, body: bytes) -> None:
    record.end = time.monotonic()
    record.outcome = "rejected" if record.status in (429, 503) else "failed"
    record.detail = body[:500].decode(errors="replace")
    try:
        record.reason = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        record.reason = str(record.status)
