"""One HTTP connection: uvicorn's on httptools, with a bound on how long and how large a request may be in coming.

Knows sockets and the parser's events; knows no route. What it has to say itself has OpenAI's shape.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024  # of request line and headers; the parser has no bound of its own


def connection_type(header_timeout: float) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config(http=…)` with this many seconds for a request to come."""

    class Bounded(Connection):
        timeout = header_timeout

    return Bounded


class Connection(HttpToolsProtocol):
    """Closes, with 408, on a client that has not sent a whole head `timeout` seconds after it began, or that
    goes silent for as long in the middle of a body; with 431 on a head that has no end."""

    timeout = 30.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._is_in_body = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is None or self._is_in_body:
            self._arm()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and not self._is_in_body and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._arm()

    def on_headers_complete(self) -> None:
        self._is_in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._head_bytes = 0
        self._disarm()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "The request is not valid HTTP/1.1.", "invalid_http")

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.timeout, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._waits_for_us:
            self._arm()
        else:
            self._refuse(408, f"The request was not sent within {self.timeout:g} s.", "request_not_sent")

    @property
    def _waits_for_us(self) -> bool:
        """Whether an earlier request is being answered, or nobody has taken what has come of this one."""
        is_answering = self.cycle is not None and not self.cycle.response_complete and not self._is_in_body
        return is_answering or bool(self.pipeline) or self.flow.read_paused

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Says why, where no response has begun that this would run into, and closes the connection."""
        self._disarm()
        if self.transport.is_closing():
            return
        has_begun = self._is_in_body and self.cycle is not None and self.cycle.response_started
        if not has_begun and not self._waits_for_us:
            body = ApiError(status, message, code=code).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
