"""One HTTP connection: uvicorn's on httptools, with a bound on how long and how large a request may be in coming.

Knows sockets and the parser's events; knows no route. What it has to say itself has OpenAI's shape.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024  # of request line, headers and trailers; the parser has no bound of its own
MAX_CHUNK_OVERHEAD = 16  # bytes that a byte of a chunked body may take beside itself


def connection_type(header_timeout: float) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config(http=…)` with this many seconds for a request to come."""

    class Bounded(Connection):
        timeout = header_timeout

    return Bounded


class Connection(HttpToolsProtocol):
    """Closes, with 408, on a client that has not sent a whole head `timeout` seconds after it began, or that
    goes silent for as long in the middle of a body; with 431 on a head that has no end. Requests before a broken one
    are answered first. A wish for another protocol is not heard, and HTTP/1.0 is given no chunks."""

    timeout = 30.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._is_in_body = False
        self._head_bytes = 0
        self._answering: RequestResponseCycle | None = None  # `cycle` is the one that was read last
        self._is_deaf = False  # nothing that still comes is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._timer is None or self._is_in_body:
            self._arm()
        self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.", "headers_too_large")

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser leaves the body to the other protocol: the request is read again without the wish for one.
            version = self.parser.get_http_version().encode()
            head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            head += [b"%s: %s" % pair for pair in self.headers if pair[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self._parse(b"\r\n".join(head) + b"\r\n\r\n" + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "The request is not valid HTTP/1.1.", "invalid_http")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._arm()

    def on_headers_complete(self) -> None:
        if self._wants_upgrade:
            return
        super().on_headers_complete()  # raises for a target that is no URL
        self._is_in_body = True
        if self.parser.get_http_version() == "1.0":
            _leave_unframed(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._head_bytes -= (1 + MAX_CHUNK_OVERHEAD) * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._wants_upgrade:
            return
        self._is_in_body = False
        self._head_bytes = 0
        self._disarm()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _wants_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

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
        """Says why, where no response has begun that this would run into, and closes the connection: at once, or when
        the requests that came whole before have been answered."""
        self._disarm()
        if self.transport.is_closing():
            return
        if self._is_in_body and self.pipeline:
            self.pipeline.popleft()  # this one; it will never be whole
            last = self.pipeline[0][0] if self.pipeline else self._answering
        else:
            last = None if self._is_in_body else self.cycle
        if last is not None and not last.response_complete:
            last.keep_alive = False
            self._is_deaf = True
            return
        if not (self._is_in_body and self.cycle.response_started):
            body = ApiError(status, message, code=code).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def _leave_unframed(cycle: RequestResponseCycle) -> None:
    """Has a response's body sent as it is: its end is that of the connection, or where its length says."""
    send = cycle.send
    cycle.chunked_encoding = False

    async def send_plain(message: Any) -> None:
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]
