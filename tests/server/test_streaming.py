from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from answers import events, expected, samples, wait_for
from conftest import Running


def stream(http: httpx.Client, prompt: Any, **options: Any) -> list[Any]:
    body = {"prompt": prompt, "temperature": 0, "stream": True, **options}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(answer.text)


def test_events_add_up_to_the_whole_answer(http: httpx.Client) -> None:
    options = {"prompt": ["añb😀", "two"], "n": 2, "seed": 2, "max_tokens": 40, "logprobs": 2, "echo": True}
    options |= {"return_token_ids": True, "return_chunks": True}
    whole = http.post("/v1/completions", json=options).json()["choices"]
    pieces = stream(http, **options, temperature=1)
    for choice in whole:
        own = [event["choices"][0] for event in pieces if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [byte for piece in own for byte in piece["token_ids"]] == choice["token_ids"]
        assert [chunk for piece in own for chunk in piece["chunks"]] == choice["chunks"]
        for name, column in choice["logprobs"].items():
            assert [item for piece in own for item in piece["logprobs"][name]] == column
        assert [piece["finish_reason"] for piece in own][-1] == choice["finish_reason"] == "length"
        assert all(piece["finish_reason"] is None and piece["text"] for piece in own[:-1])


def test_every_event_has_the_shape_of_a_completion(http: httpx.Client) -> None:
    for event in stream(http, "abc"):
        assert set(event) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert event["object"] == "text_completion"
        (choice,) = event["choices"]
        assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}


def test_usage_comes_last_when_it_is_asked_for(http: httpx.Client) -> None:
    *others, last = stream(http, ["abc", "de"], n=2, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 64,
        "total_tokens": 71,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"chunks": [2 * 7 + 2 * 7, 2 * 3 + 2 * 3]},
    }
    assert all(event["usage"] is None for event in others)


def test_continuous_usage_counts_the_bytes_so_far(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = stream(http, "abc", max_tokens=30, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == 30
    assert all(event["usage"]["prompt_tokens"] == 4 for event in pieces)


def test_stream_interval_is_the_least_an_event_carries(http: httpx.Client) -> None:
    pieces = stream(http, "abc", max_tokens=50, stream_interval=7, return_token_ids=True)
    sizes = [len(event["choices"][0]["token_ids"]) for event in pieces]
    assert sum(sizes) == 50
    assert all(size >= 7 for size in sizes[:-1])


def test_events_never_split_a_character(http: httpx.Client) -> None:
    text = "".join(event["choices"][0]["text"] for event in stream(http, "€😀", max_tokens=70))
    assert text == "€😀" * 10
    assert all("\ufffd" not in event["choices"][0]["text"] for event in stream(http, "€😀", max_tokens=70))


def test_a_row_that_fails_ends_its_choice_alone(http: httpx.Client) -> None:
    pieces = stream(http, ["good", "bad!nan"], max_tokens=8)
    last = {event["choices"][0]["index"]: event["choices"][0] for event in pieces}
    assert (last[0]["finish_reason"], last[1]["finish_reason"]) == ("length", "error")
    assert last[1]["error"] == "a logit is not a number"


def test_events_are_flushed_as_they_come_at_light_load(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread(tick_seconds=0.02)
    with running.client() as client:
        pieces = stream(client, "abc", max_tokens=10, return_token_ids=True)
    assert [event["choices"][0]["token_ids"] for event in pieces] == [[byte] for byte in expected(b"abc", 10)]


def test_rows_that_run_together_gather_their_bytes(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread({"stream_flush_ms": 200.0}, tick_seconds=0.001)
    with running.client() as client:
        pieces = stream(client, ["abc", "añb😀"], n=8, max_tokens=100, temperature=1, seed=0)
    texts = [
        "".join(event["choices"][0]["text"] for event in pieces if event["choices"][0]["index"] == index)
        for index in range(16)
    ]
    assert [texts[0].encode(), texts[1].encode()] == [expected(b"abc", 100), expected(b"abc", 100, choice=1)]
    assert len(pieces) < 16 * 100 / 2
    assert all(event["choices"][0]["text"] for event in pieces if event["choices"][0]["finish_reason"] is None)


async def test_sixteen_streams_at_once_get_what_each_gets_alone(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread(max_num_seqs=4, tick_seconds=0.001)

    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {"prompt": f"prompt {number} ", "temperature": 0, "max_tokens": 20 + number, "stream": True}
        answer = await client.post("/v1/completions", json=body)
        return "".join(event["choices"][0]["text"] for event in events(answer.text))

    async with httpx.AsyncClient(base_url=running.url, timeout=30, trust_env=False) as client:
        texts = await asyncio.gather(*(one(client, number) for number in range(16)))
    for number, text in enumerate(texts):
        assert text.encode() == expected(f"prompt {number} ".encode(), 20 + number)


def journal_entries(path: Any) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_goes_away_frees_its_row(
    serve_in_thread: Callable[..., Running], tmp_path: Any, streaming: bool
) -> None:
    journal = tmp_path / "journal"
    running = serve_in_thread(tick_seconds=0.01, journal=str(journal))
    reader, writer = await asyncio.open_connection("127.0.0.1", port(running))
    body = json.dumps({"prompt": "abc", "n": 2, "max_tokens": 500, "stream": streaming}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    if streaming:
        await reader.readuntil(b"data: ")
    else:
        await asyncio.to_thread(wait_for, lambda: len(journal_entries(journal)) == 2)
    writer.close()
    await asyncio.to_thread(wait_for, lambda: [what for what, _ in journal_entries(journal)].count("abort") >= 2)
    with running.client() as client:
        await asyncio.to_thread(
            wait_for, lambda: samples(client.get("/metrics").text)["hnet_num_requests_running"] == 0
        )
        finished = samples(client.get("/metrics").text)
    assert finished['hnet_request_finished_total{reason="abort"}'] == 2


def port(running: Running) -> int:
    return int(running.url.rpartition(":")[2])


async def test_a_reader_that_is_slow_holds_up_nobody(serve_in_thread: Callable[..., Running]) -> None:
    running = serve_in_thread(max_model_len=200_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", port(running), limit=1024)
    options = {"logprobs": 20, "stream": True, "temperature": 0}
    body = json.dumps({"prompt": "abc", "max_tokens": 20_000, **options}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await reader.readuntil(b"data: ")  # and no further: the socket's buffers fill up
    async with httpx.AsyncClient(base_url=running.url, timeout=30, trust_env=False) as client:
        answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 200, "temperature": 0})
        assert answer.json()["choices"][0]["text"] == "x" * 200
        await asyncio.to_thread(
            wait_for, lambda: running.server.service.client.num_live == 0, 60
        )  # the engine did not wait for the reader either
    rest = b""
    while b"data: [DONE]" not in rest[-100:]:
        rest += await reader.read(65536)
    assert rest.count(b'"finish_reason":"length"') == 1
    writer.close()
