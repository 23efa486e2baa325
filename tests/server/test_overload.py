"""More than a server can do, on the real process: everybody has a whole answer or is told when to come back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from answers import events, expected, samples
from conftest import ServerProcess
from raw import answers, completion, request

from server.metrics import FINISH_REASONS

ROWS, WAITING, NUM_BYTES, TICK = 4, 12, 20, 0.005
CAPACITY = ROWS / (NUM_BYTES * TICK)  # requests a second
REFUSALS = {429: "slow_down", 503: "server_is_overloaded"}


async def ask(url: str, number: int) -> int:
    """One request among many, on a connection of its own; its status, once all that comes with it is found right."""
    streams = number % 2 == 0
    body = completion(prompt=f"{number} ", max_tokens=NUM_BYTES, stream=streams)
    address = urlsplit(url)
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(request(body=body))
        (answer,) = answers(await reader.read())
    writer.close()
    if answer.status in REFUSALS:
        assert answer.error_code == REFUSALS[answer.status]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert 100 <= int(answer.headers["retry-after-ms"]) <= 60_000
        return answer.status
    assert answer.status == 200
    pieces = events(answer.body.decode()) if streams else [answer.json]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert text.encode() == expected(f"{number} ".encode(), NUM_BYTES)
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    return 200


async def test_two_seconds_of_overload_at_ten_times_the_capacity(serve_process: Callable[..., ServerProcess]) -> None:
    server = serve_process(settings={"max_waiting_requests": WAITING}, max_num_seqs=ROWS, tick_seconds=TICK)
    rate = 10 * CAPACITY

    async def later(number: int) -> int:
        await asyncio.sleep(number / rate)  # whether earlier ones have been answered or not
        return await ask(server.url, number)

    statuses = Counter(await asyncio.gather(*(later(number) for number in range(round(2 * rate)))))
    with server.client() as client:
        values = samples(client.get("/metrics").text)
    assert statuses[200] >= ROWS + WAITING
    assert statuses[429] + statuses[503] > 0
    ended = sum(values[f'hnet_request_finished_total{{reason="{reason}"}}'] for reason in FINISH_REASONS)
    assert values['hnet_request_finished_total{reason="length"}'] == ended == statuses[200]
    rejected = sum(value for name, value in values.items() if name.startswith("hnet_admission_rejections_total{"))
    assert rejected == statuses[429] + statuses[503]
    assert values["hnet_num_requests_running"] == values["hnet_prompt_backlog_bytes"] == 0
