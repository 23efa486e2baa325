"""HTTP spoken by hand: requests as bytes, connections that end in many ways, answers taken apart."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

Leaving = Literal["close", "half-close", "reset"]
LEAVINGS: tuple[Leaving, ...] = ("close", "half-close", "reset")
SECONDS = 15.0  # for anything to come


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error_code(self) -> str | None:
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error["code"]  # type: ignore[no-any-return]


def completion(**options: Any) -> bytes:
    """The body of a request for the fake engine's `abc`."""
    return json.dumps({"prompt": "abc", "max_tokens": 3, "temperature": 0, **options}).encode()


def request(
    *headers: bytes, line: bytes = b"POST /v1/completions HTTP/1.1", body: bytes = b"", ends: bool = True
) -> bytes:
    """A request with these headers, Content-Length among them unless they say how long it is themselves.

    `ends`: it is the connection's last one.
    """
    names = {header.partition(b":")[0].lower() for header in headers}
    head = [line, b"host: x", *headers]
    if body and not names & {b"content-length", b"transfer-encoding"}:
        head.append(b"content-length: %d" % len(body))
    if ends:
        head.append(b"connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(*pieces: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """A body in chunks."""
    return (
        b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"
    )


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """A connection to a server; a small receive buffer makes its reader a slow one."""
    address = urlsplit(url)
    assert address.hostname is not None
    peer = socket.socket()
    peer.settimeout(SECONDS)
    if receive_buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.connect((address.hostname, address.port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def leave(peer: socket.socket, how: Leaving) -> None:
    """Ends a connection: in order, on the sending side alone (the server is to end the other), or at once."""
    if how == "half-close":
        peer.shutdown(socket.SHUT_WR)
        rest(peer)
    elif how == "reset":
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def rest(peer: socket.socket) -> bytes:
    """All that still comes until the server ends the connection, in order or not."""
    data = b""
    try:
        while piece := peer.recv(65536):
            data += piece
    except ConnectionResetError:  # it did not read all that was sent
        return data
    return data


def until(peer: socket.socket, mark: bytes) -> None:
    """Reads until `mark` has come."""
    data = b""
    while mark not in data:
        piece = peer.recv(1000)
        assert piece, data
        data += piece


def talk(url: str, *pieces: bytes) -> bytes:
    """Sends the pieces, each in a packet of its own, and gives all that comes."""
    with connect(url) as peer:
        try:
            for piece in pieces:
                peer.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):  # it has heard enough; what it said is there to read
            return rest(peer)
        return rest(peer)


def answers(data: bytes, bodiless: Collection[int] = ()) -> list[Answer]:
    """The answers that came one after the other; their framing is checked. Those at places `bodiless` answer HEAD."""
    found: list[Answer] = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, head
        line, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = line.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if status == "100" or len(found) in bodiless:
            pass
        elif "content-length" in headers:
            length = int(headers["content-length"])
            body, data = data[:length], data[length:]
            assert len(body) == length
        elif headers.get("transfer-encoding") == "chunked":
            body, data = _unchunked(data)
        else:
            assert headers["connection"] == "close"
            body, data = data, b""
        found.append(Answer(int(status), headers, body))
    return found


def _unchunked(data: bytes) -> tuple[bytes, bytes]:
    """The body at the beginning of `data`, and what comes after it."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n"
        body, data = body + data[:length], data[length + 2 :]
        if length == 0:
            return body, data
