"""The front: every request is handed to a replica, and its response back to the client as it comes.

Knows HTTP's outside only: which replica, what to do when it is lost, and whose metrics these are. What is asked and
answered is the replicas' business; it looks into a body for the beginning of its prompt and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.body_limit import BodyLimit
from server.cluster.affinity import beginnings
from server.cluster.call import Accepted, Call, Headers, Piece, Start, Whole
from server.cluster.front_metrics import FrontMetrics
from server.cluster.gathered_metrics import gathered
from server.errors import ApiError, engine_down, engine_failed, internal
from server.request_id import RequestIds
from server.sse import DONE, disconnected, end, event

ATTEMPTS = 3  # replicas that a request is handed to, one after another, when they are lost before they answer
ACCEPT_SECONDS = 10.0  # for a replica to take a request
GATHER_SECONDS = 5.0  # for all replicas to give their metrics
REPLICA_HEADER = b"x-hnet-replica"
_OURS = frozenset({b"x-request-id", b"transfer-encoding", b"connection"})  # of a response; the front's server sets them


class ReplicaLost(Exception):
    """The replica that worked on a call has died, or cannot be reached any more."""


class NoReplica(Exception):
    """No replica takes the call."""


class Replicas(Protocol):
    """The way to the replicas. `call` raises ReplicaLost and NoReplica; closed early, it ends the call."""

    def call(self, call: Call) -> AsyncGenerator[Piece, None]: ...

    async def all(self, call: Call) -> Sequence[Whole]: ...


def build_front(
    name: str, replicas: Replicas, metrics: FrontMetrics, max_body_bytes: int, *, names_requests: bool = True
) -> ASGIApp:
    """The ASGI application. names_requests: whether responses carry `x-request-id`, or a proxy in front sees to it."""
    return RequestIds(BodyLimit(Front(name, replicas, metrics), max_body_bytes), in_responses=names_requests)


class Front:
    """name: what its own metrics are labelled with."""

    def __init__(self, name: str, replicas: Replicas, metrics: FrontMetrics) -> None:
        self._name, self._replicas, self._metrics = name, replicas, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served here")
        response = _Response(send, scope["state"]["request_id"])
        try:
            call = await _read(scope, receive)
            if call is not None:
                await _until_gone(receive, lambda: self._answer(call, response))
        except ApiError as error:
            await error.send(scope, receive, send)

    async def _answer(self, call: Call, response: _Response) -> None:
        if call.path == "/metrics" and call.method in ("GET", "HEAD"):
            await self._gather(call, response)
            return None
        for attempt in range(ATTEMPTS):
            if attempt:
                self._metrics.repeated.inc()
            try:
                return await self._hand_over(call, response)
            except ReplicaLost:
                if response.has_begun:
                    self._metrics.lost.inc()
                    return await response.break_off()
            except (NoReplica, TimeoutError) as error:
                raise engine_down(retry_after=5) from error
        self._metrics.lost.inc()
        raise engine_failed()

    async def _hand_over(self, call: Call, response: _Response) -> None:
        pieces = self._replicas.call(call)
        try:
            async with asyncio.timeout(ACCEPT_SECONDS):
                accepted = await anext(pieces, None)
            if not isinstance(accepted, Accepted):
                raise ReplicaLost
            async for piece in pieces:
                if isinstance(piece, Start):
                    response.hold(piece, accepted.replica)
                elif isinstance(piece, bytes):
                    await response.write(piece)
            await response.finish()
        finally:
            await pieces.aclose()

    async def _gather(self, call: Call, response: _Response) -> None:
        """All replicas' metrics, each sample with its replica's name, and this front's."""
        try:
            async with asyncio.timeout(GATHER_SECONDS):
                wholes = await self._replicas.all(call)
        except (ReplicaLost, NoReplica, TimeoutError) as error:
            raise engine_down(retry_after=5) from error
        refused = next((each for each in wholes if each.status != 200), None)
        if refused is not None:  # no key, say: they all have the same keys
            response.hold(Start(refused.status, refused.headers), refused.replica)
            await response.write(refused.body)
            return await response.finish()
        expositions = {each.replica: each.body.decode() for each in wholes}
        expositions[self._name] = generate_latest(self._metrics.registry).decode()
        body = gathered(expositions)
        response.hold(Start(200, ((b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode()),)), self._name)
        await response.write(body)
        return await response.finish()


class _Response:
    """What goes to the client. A stream of events goes as it comes; anything else is kept until it is whole, so that it
    can still come from another replica."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._start: Start | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._kept: list[bytes] = []
        self._is_stream = False
        self.has_begun = False

    def hold(self, start: Start, replica: str) -> None:
        """What comes before the body; a second one stands for the first, of which nothing was sent."""
        self._start, self._kept = start, []
        self._headers = [(name, value) for name, value in start.headers if name.lower() not in _OURS]
        self._headers.append((REPLICA_HEADER, replica.encode()))
        self._is_stream = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start.headers
        )

    async def write(self, data: bytes) -> None:
        if not self._is_stream:
            self._kept.append(data)
            return
        await self._begin()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        await self._begin()
        await self._send({"type": "http.response.body", "body": b"".join(self._kept), "more_body": False})

    async def break_off(self) -> None:
        """Ends a stream whose replica was lost the way a stream ends whose engine failed."""
        data = event(engine_failed().encode()) + DONE
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _begin(self) -> None:
        if self.has_begun:
            return
        if self._start is None:
            raise internal(self._request_id)
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": self._start.status, "headers": self._headers})


async def _read(scope: Scope, receive: Receive) -> Call | None:
    """The request with its whole body, None where the client leaves meanwhile. Raises ApiError (413)."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = b"".join(parts)
    headers: Headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    named = tuple(pair for pair in headers if pair[0] != b"x-request-id")
    return Call(
        method=scope["method"],
        path=scope["path"],
        query=scope.get("query_string", b""),
        headers=(*named, (b"x-request-id", scope["state"]["request_id"].encode())),
        body=body,
        scheme=scope.get("scheme", "http"),
        client=tuple(scope["client"]) if scope.get("client") else None,
        beginnings=beginnings(prompt_of(body)),
    )


def prompt_of(body: bytes) -> bytes:
    """Bytes that are alike where prompts are: the prompt itself, or a chat's roles and texts in order, behind the salt
    that keeps caches apart. Empty for whatever is not such a request: a replica will say what is wrong with it."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    if not isinstance(fields, dict):
        return b""
    messages = fields.get("messages")
    if isinstance(messages, list):
        said = [each for each in messages if isinstance(each, dict)]
        parts = [part for each in said for part in (_bytes(each.get("role")), _bytes(each.get("content")))]
    else:
        parts = [_bytes(fields.get("prompt"))]
    prompt = b"\0".join(parts)
    return _bytes(fields.get("cache_salt")) + prompt if prompt else b""


def _bytes(content: Any) -> bytes:
    """Of a text, of parts of type text, of numbers of bytes, or of the first of several prompts."""
    if isinstance(content, str):
        return content.encode()
    if not isinstance(content, list) or not content:
        return b""
    if isinstance(content[0], int):
        return bytes(each for each in content if isinstance(each, int) and 0 <= each < 256)
    if isinstance(content[0], dict):
        return b"\n".join(_bytes(each.get("text")) for each in content if isinstance(each, dict))
    return _bytes(content[0]) if isinstance(content[0], str) or content[0] else b""


async def _until_gone(receive: Receive, work: Callable[[], Any]) -> None:
    """Does the work, and gives it up when the client goes away."""
    worker, watcher = asyncio.create_task(work()), asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(worker, watcher)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message: Message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
