"""A light client for benchmarks: concurrent streamed completions over plain sockets.

It reads events and counts bytes by the final usage, so that the client costs little
beside the server on the same machine. Loopback only.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Load:
    """Bytes of completions, wall seconds from the first request to the last byte, events received, and the median
    seconds to a stream's first event."""

    generated: int
    seconds: float
    events: int
    first: float


async def run_streams(port: int, prompts: list[bytes], max_tokens: int, peer: str | None = None) -> Load:
    """Streams a completion of each prompt at once from 127.0.0.1:port.

    peer: the model's name at another OpenAI-compatible server, which is sent text and no field of ours.
    """
    started = time.perf_counter()
    done = await asyncio.gather(*(_stream(port, prompt, max_tokens, peer) for prompt in prompts))
    seconds = time.perf_counter() - started
    return Load(sum(d[0] for d in done), seconds, sum(d[1] for d in done), median(d[2] for d in done))


async def _stream(port: int, prompt: bytes, max_tokens: int, peer: str | None) -> tuple[int, int, float]:
    ours = {"prompt": list(prompt), "utf8": "raw"}
    body = json.dumps(
        {
            **(ours if peer is None else {"prompt": prompt.decode(), "model": peer}),
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": 1,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    started, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answered {status.decode().strip()}: {(await reader.read()).decode()}")
    events, usage = 0, 0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - started
            events += 1
            if b'"usage":{' in line:
                usage = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    return usage, events, first
