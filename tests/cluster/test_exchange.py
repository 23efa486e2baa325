from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.types import Receive, Scope, Send

from server.cluster.call import Call, Start
from server.cluster.exchange import answer

CALL = Call("POST", "/path", b"a=1", ((b"name", b"value"),), b"body")


def body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def test_the_application_gets_the_request_and_its_response_comes_in_order() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/path", b"a=1")
        assert (await receive()) == {"type": "http.request", "body": b"body", "more_body": False}
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x", b"y")]})
        await send(body(b"one"))
        await send(body(b"two", more=False))

    pieces = [piece async for piece in answer(app, CALL)]
    assert pieces[0] == Start(201, ((b"x", b"y"),))
    assert b"".join(piece for piece in pieces[1:] if isinstance(piece, bytes)) == b"onetwo"


async def test_pieces_are_gathered() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send(body(b"."))

    times = [time.monotonic() async for piece in answer(app, CALL, gather=lambda: 0.1) if isinstance(piece, bytes)]
    assert times[1] - times[0] >= 0.1


async def test_the_end_does_not_wait() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await send(body(b"."))

    async with asyncio.timeout(20):
        pieces = [piece async for piece in answer(app, CALL, gather=lambda: 3600.0)]
    assert pieces[1:] == [b".", b"."]


async def test_the_application_waits_while_nobody_takes_what_it_says() -> None:
    said = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal said
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10):
            await send(body(b"."))
            said += 1

    pieces = answer(app, CALL)
    await anext(pieces)
    await asyncio.sleep(0.05)
    assert said <= 1
    assert b"".join([piece async for piece in pieces if isinstance(piece, bytes)]) == b"." * 10


async def test_closed_early_the_application_hears_that_the_client_has_gone() -> None:
    heard = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        heard.append((await receive())["type"])
        await send(body(b"to nobody"))
        await send(body(b"at all"))

    pieces = answer(app, CALL)
    await anext(pieces)
    await pieces.aclose()
    assert heard == ["http.disconnect"]
