"""A light client for benchmarks: concurrent streamed completions over plain sockets.

It reads events and counts bytes by the final usage, so that the client costs little
beside the server on the same machine. Loopback only.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """Bytes of completions, wall seconds from the first request to the last byte, and events received."""

    generated: int
    seconds: float
    events: int


async def run_streams(port: int, prompts: list[bytes], max_tokens: int) -> Load:
    """Streams a completion of each prompt at once from 127.0.0.1:port."""
    started = time.perf_counter()
    done = await asyncio.gather(*(_stream(port, prompt, max_tokens) for prompt in prompts))
    return Load(sum(d[0] for d in done), time.perf_counter() - started, sum(d[1] for d in done))


async def _stream(port: int, prompt: bytes, max_tokens: int) -> tuple[int, int]:
    body = json.dumps(
        {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": 1,
            "ignore_eos": True,
            "utf8": "raw",
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
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
            events += 1
            if b'"usage":{' in line:
                usage = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    return usage, events
