"""What goes between the front and the replicas: a request as it came, and its response in pieces. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, read to its end. beginnings: of its prompt, see `affinity`."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    scheme: str = "http"
    client: tuple[str, int] | None = None
    beginnings: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first piece: a replica has taken the request."""

    replica: str


@dataclass(frozen=True, slots=True)
class Start:
    """The second one: what comes before the body."""

    status: int
    headers: Headers


Piece = Accepted | Start | bytes


@dataclass(frozen=True, slots=True)
class Whole:
    """A response that has ended."""

    replica: str
    status: int
    headers: Headers
    body: bytes
