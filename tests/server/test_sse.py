from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from answers import events

from server.errors import invalid
from server.sse import DONE, KEEP_ALIVE, EventStream, EventTemplate, Write

SILENCE = 0.02  # seconds until a sign of life, where a test sets it


class Connection:
    """The ASGI side of one response: what was sent, and a client that stays until it is told to go."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.is_over = False
        self.gone = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.closed = 0

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.open.wait()
        if message["type"] == "http.response.body":
            self.body.append(message["body"])
            self.is_over = not message["more_body"]

    async def run(self, produce: Any) -> bytes:
        await EventStream(produce, self.close, "id")({"type": "http"}, self.receive, self.send)
        assert self.closed == 1
        return b"".join(self.body)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("text", ["plain", 'a "quote" \\ and\nlines', "añb😀\u2028", ""])
def test_a_templates_event_is_that_of_the_whole_document(text: str) -> None:
    head, fields = {"id": 'cmpl-"1"', "created": 1, "model": "m}"}, {"choices": [{"text": text}], "usage": None}
    event = EventTemplate(head).event(fields)
    assert events(event.decode() + DONE.decode()) == [{**head, **fields}]
    assert list(json.loads(event[len(b"data: ") :])) == [*head, *fields]


async def test_a_stream_ends_with_done_and_is_closed() -> None:
    async def produce(write: Write) -> None:
        await write(b"data: {}\n\n")

    connection = Connection()
    assert await connection.run(produce) == b"data: {}\n\n" + DONE
    assert connection.is_over


async def test_an_error_in_the_stream_is_an_event_before_done() -> None:
    async def produce(write: Write) -> None:
        await write(b"data: {}\n\n")
        raise invalid("seed: is wrong", "seed")

    body = await Connection().run(produce)
    _, error = events(body.decode())
    assert error["error"]["param"] == "seed"


async def test_a_silent_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sse.KEEP_ALIVE_SECONDS", SILENCE)
    connection = Connection()

    async def produce(write: Write) -> None:
        await write(b"data: {}\n\n")
        async with asyncio.timeout(10):
            while connection.body.count(KEEP_ALIVE) < 2:
                await asyncio.sleep(SILENCE / 10)

    body = await connection.run(produce)
    assert events(body.decode()) == [{}]


async def test_a_reader_that_takes_nothing_is_not_sent_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sse.KEEP_ALIVE_SECONDS", SILENCE)
    connection = Connection()

    async def produce(write: Write) -> None:
        connection.open.clear()
        asyncio.get_running_loop().call_later(5 * SILENCE, connection.open.set)
        await write(b"data: {}\n\n")

    assert await connection.run(produce) == b"data: {}\n\n" + DONE


async def test_a_client_that_goes_away_ends_the_producer() -> None:
    connection = Connection()
    ended = []

    async def produce(write: Write) -> None:
        await write(b"data: {}\n\n")
        connection.gone.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    await connection.run(produce)
    assert ended == [True]
    assert not connection.is_over
