"""Replicas on Ray Serve: what a second one gives, what routing by prefix gives, and what the loss of one costs.

    hnet bench cluster [--model MODEL] [--only scaling|affinity|loss] [--report docs/ecosystem.md] [--json FILE]

A Ray cluster on this machine, reached over Ray's HTTP proxy on the loopback. Needs the extra `ray`. Every replica has
one thread; where there are fewer cores than replicas, fronts and proxies, a ratio says what that machine gives and no
more."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from benchmarks.ray_cluster import ray_server, replica_pids
from benchmarks.report import Row, finish, measured, print_table, rows_in_markdown, write_part
from benchmarks.server_process import ServerProcess, free_port, our_server
from server.cluster.gathered_metrics import LABEL

STREAMS, NEW_BYTES, ROUNDS = 32, 384, 3
GROUPS, TURNS, SHARED_BYTES = 8, 6, 1024
LOST_STREAMS, LOST_REQUESTS, LOST_BYTES, LOST_AFTER = 16, 8, 400, 1.0
RECOVERY_SECONDS = 120.0
WORDS = ("the ship", "three weeks at sea", "when a light", "was seen", "far to the west", "and all men", "came on deck")


@dataclass(frozen=True)
class Answer:
    """What became of one request. end: `complete`, `error` (an error event, then [DONE]), `broken`, or `refused`."""

    text: str
    end: str
    replica: str
    first: float  # seconds to the first text
    seconds: float


def prompt(number: int, size: int = 128) -> str:
    """Words in an order that the number gives, so that no two prompts begin alike."""
    rotated = WORDS[number % len(WORDS) :] + WORDS[: number % len(WORDS)]
    return (f"{number} " + " ".join(rotated) * (1 + size // 100))[:size]


async def stream(client: httpx.AsyncClient, text: str, max_tokens: int, seed: int = 1) -> Answer:
    """A streamed completion, whatever becomes of it."""
    began, first, parts, end = time.monotonic(), 0.0, [], "broken"
    fields = {"prompt": text, "max_tokens": max_tokens, "seed": seed, "stream": True, "ignore_eos": True}
    replica = ""
    try:
        async with client.stream("POST", "/v1/completions", json=fields) as response:
            replica = response.headers.get("x-hnet-replica", "")
            if response.status_code != 200:
                return Answer("", "refused", replica, 0.0, time.monotonic() - began)
            has_failed = False
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    end = "error" if has_failed else "complete"
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    has_failed |= "error" in event
                    parts += [choice["text"] for choice in event.get("choices", ())]
                    first = first or time.monotonic() - began
    except httpx.HTTPError:
        end = "broken"
    return Answer("".join(parts), end, replica, first, time.monotonic() - began)


async def whole(client: httpx.AsyncClient, text: str, max_tokens: int, seed: int = 1) -> Answer:
    """A completion in one piece."""
    began = time.monotonic()
    fields = {"prompt": text, "max_tokens": max_tokens, "seed": seed, "ignore_eos": True}
    try:
        response = await client.post("/v1/completions", json=fields)
    except httpx.HTTPError:
        return Answer("", "broken", "", 0.0, time.monotonic() - began)
    seconds = time.monotonic() - began
    replica = response.headers.get("x-hnet-replica", "")
    if response.status_code != 200:
        return Answer("", "refused", replica, 0.0, seconds)
    return Answer(response.json()["choices"][0]["text"], "complete", replica, seconds, seconds)


def client_of(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False, limits=limits)


def scaling(model: str) -> list[Row]:
    """Bytes a second of the same streams: one server, one replica behind Ray, two of them."""
    options = {} if model == "demo" else {"model": model}
    rates: dict[str, float] = {}
    port = free_port()
    with our_server(model, port, "--threads", "1") as server:
        server.wait()
        rates["one server, without Ray"] = asyncio.run(_rate(port))
    for replicas in (1, 2):
        port = free_port()
        with ray_server(port, {**options, "replicas": replicas, "threads": 1}) as server:
            server.wait()
            rates[f"replicas={replicas}"] = asyncio.run(_rate(port))
    rows = [Row(f"rate {name}", rate, "bytes/s") for name, rate in rates.items()]
    alone, one, two = rates.values()
    rows[1] = Row(rows[1].name, one, "bytes/s", rows[0].name, one / alone)
    rows[2] = Row(rows[2].name, two, "bytes/s", rows[1].name, two / one)
    return rows


async def _rate(port: int) -> float:
    async with client_of(port) as client:
        rates = []
        for each in range(ROUNDS + 1):
            began = time.monotonic()
            numbers = range(each * STREAMS, (each + 1) * STREAMS)
            answers = await asyncio.gather(*(stream(client, prompt(number), NEW_BYTES) for number in numbers))
            assert all(answer.end == "complete" for answer in answers)
            rates.append(STREAMS * NEW_BYTES / (time.monotonic() - began))
        return median(rates[1:])  # the first is for warming up


def affinity(model: str) -> list[Row]:
    """Bytes of prompts that came from a prefix cache, of all bytes of prompts, with and without routing by prefix."""
    options = {} if model == "demo" else {"model": model}
    rows: list[Row] = []
    for routing in ("balanced", "prefix"):
        port = free_port()
        with ray_server(port, {**options, "replicas": 2, "threads": 1, "routing": routing}) as server:
            server.wait()
            rate, first = asyncio.run(hit_rate(port))
        rows += [Row(f"prefix hits routing={routing}", rate, "of 1"), Row(f"first byte {routing}", first * 1e3, "ms")]
    for index in (2, 3):
        before, here = rows[index - 2], rows[index]
        rows[index] = Row(here.name, here.value, here.unit, before.name, here.value / before.value)
    return rows


async def hit_rate(port: int) -> tuple[float, float]:
    """GROUPS conversations of TURNS turns, each turn a prompt that goes on from the last one: the share of their bytes
    that were in a cache, and the median seconds to the first byte."""
    async with client_of(port) as client:
        before = await scrape(client)
        texts = [prompt(1000 + group, SHARED_BYTES) for group in range(GROUPS)]
        firsts = []
        for turn in range(TURNS):
            answers = await asyncio.gather(*(stream(client, text, 16) for text in texts))
            assert all(answer.end == "complete" for answer in answers)
            texts = [f"{text}{answer.text} {turn}" for text, answer in zip(texts, answers, strict=True)]
            firsts += [answer.first for answer in answers] if turn else []
        after = await scrape(client)
    names = ("hnet_prefix_cache_hits_bytes_total", "hnet_prefix_cache_queries_bytes_total")
    hits, queries = (sum(after[name].values()) - sum(before[name].values()) for name in names)
    return hits / queries, median(firsts)


async def scrape(client: httpx.AsyncClient) -> dict[str, dict[str, float]]:
    """Samples by name and replica; of those with other labels the last one. None at all while a replica is missing."""
    reply = await client.get("/metrics")
    found: dict[str, dict[str, float]] = {}
    for line in reply.text.splitlines() if reply.status_code == 200 else ():
        if not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name, _, labels = series.partition("{")
            replica = labels.partition(f'{LABEL}="')[2].partition('"')[0]
            found.setdefault(name, {})[replica] = float(value)
    return found


@dataclass(frozen=True)
class Loss:
    """What the loss of a replica under load did. unlike: completions that are not what the same request gives alone,
    or, of streams that were cut, not a beginning of it."""

    streams: list[Answer]
    requests: list[Answer]
    unlike: int
    first_answer: float  # seconds from the loss to the end of the first request sent after it
    both_again: float  # seconds from the loss until two replicas answer


async def lose_one(port: int, server: ServerProcess) -> Loss:
    """Kills one of two replicas while streams and requests run."""
    async with client_of(port) as client:
        texts = [prompt(2000 + number) for number in range(LOST_STREAMS + LOST_REQUESTS)]
        running = [asyncio.create_task(stream(client, text, LOST_BYTES)) for text in texts[:LOST_STREAMS]]
        running += [asyncio.create_task(whole(client, text, LOST_BYTES)) for text in texts[LOST_STREAMS:]]
        await asyncio.sleep(LOST_AFTER)
        (victim, *_) = replica_pids(server)
        os.kill(victim, signal.SIGKILL)
        lost = time.monotonic()
        while (await whole(client, "after", 1)).end != "complete":
            await asyncio.sleep(0.02)
        first_answer = time.monotonic() - lost
        answers = await asyncio.gather(*running)
        while len([pid for pid in replica_pids(server) if pid != victim]) < 2 or not await _two_answer(client):
            if time.monotonic() - lost > RECOVERY_SECONDS:
                raise RuntimeError(f"there were not two replicas again within {RECOVERY_SECONDS:g} s")
            await asyncio.sleep(0.1)
        both_again = time.monotonic() - lost
        alone = [await whole(client, text, LOST_BYTES) for text in texts]
    unlike = sum(
        mine.text != other.text if mine.end == "complete" else not other.text.startswith(mine.text)
        for mine, other in zip(answers, alone, strict=True)
    )
    return Loss(answers[:LOST_STREAMS], answers[LOST_STREAMS:], unlike, first_answer, both_again)


async def _two_answer(client: httpx.AsyncClient) -> bool:
    return len((await scrape(client)).get("hnet_generation_bytes_total", {})) == 2


def loss(model: str) -> list[Row]:
    """What becomes of streams and requests when a replica is killed, and how long it takes to be as before."""
    options = {} if model == "demo" else {"model": model}
    port = free_port()
    with ray_server(port, {**options, "replicas": 2, "threads": 1}) as server:
        server.wait()
        seen = asyncio.run(lose_one(port, server))
    ends = [answer.end for answer in seen.streams]
    return [
        Row("streams when a replica was killed", len(ends), "streams"),
        Row("of them complete", ends.count("complete"), "streams"),
        Row("of them ended in an error event", ends.count("error"), "streams"),
        Row("of them lost or broken", len(ends) - ends.count("complete") - ends.count("error"), "streams"),
        Row("requests not streamed, answered", [a.end for a in seen.requests].count("complete"), f"of {LOST_REQUESTS}"),
        Row("with other bytes than alone", seen.unlike, "completions"),
        Row("first request after it answered", seen.first_answer, "s"),
        Row("two replicas again", seen.both_again, "s"),
    ]


PARTS = {"scaling": scaling, "affinity": affinity, "loss": loss}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, random:NAME or a directory")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="a part; may be given again")
    parser.add_argument("--report", type=Path, help="write a part of this page")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    rows = [row for name, part in PARTS.items() if args.only is None or name in args.only for row in part(args.model)]
    lines = [[r.name, f"{r.value:.4g}", r.unit, f"{r.ratio:.2f}" if r.ratio is not None else ""] for r in rows]
    print_table(f"Replicas on Ray Serve, {args.model} model", ["what", "figure", "unit", "ratio"], lines)
    if args.report is not None:
        cores = os.cpu_count()
        said = (
            f"The {args.model} model, one thread a replica, on {cores} cores that client, proxy and front share: where "
            "there are no more cores than such processes, rates say what Ray's processes take, not what replicas give."
        )
        write_part(
            args.report,
            "Replicas on Ray Serve",
            [f"{measured('hnet bench cluster')} {said}", "", *rows_in_markdown(rows)],
        )
    finish("cluster", rows, args.json)


if __name__ == "__main__":
    main()
