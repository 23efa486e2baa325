"""Bytes decoded a second: the engine, the server over HTTP, the one-row-at-a-time loop, and the roofline.

    python -m benchmarks.decode [--model demo] [--rows 1,4,16,64] [--json FILE]

All figures of a model come from one run and are given as ratios to the naive loop of the same row
count: the same runtime stepping one row after the other, which is what a script without batching does
(it keeps all state and recomputes nothing). The roofline is the time to read the weights that the engine's steps
really read (a stage's weights once for every step that reached it) at the bandwidth measured around the run, with a
buffer as large as the weights.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.http_load import run_streams
from benchmarks.report import Row, print_table, write_json
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Request, SamplingParams, StepRecord

PROMPT = b"\xfeIt was a bright cold day in April, and the clocks were "
_STEP_KINDS = ("byte", "stage")


@dataclass(frozen=True)
class Decoded:
    """Bytes decoded in seconds of steps alone (prefill left out), and what the steps read."""

    generated: int
    seconds: float
    weight_bytes: int
    chunks: int

    @property
    def rate(self) -> float:
        return self.generated / self.seconds


def prompts(rows: int) -> list[bytes]:
    """One prompt a row, all different, as users' are."""
    return [PROMPT + f"{index:03d} ".encode() for index in range(rows)]


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=1, ignore_eos=True, utf8="raw")


def stage_weight_bytes(engine: Engine) -> list[int]:
    """Bytes of weights a step of each stage reads; embeddings are looked up, the head is read with stage 0."""
    size = engine.model.dtype.itemsize
    parameters = [stage.parameters for stage in engine.info.stages]
    parameters[0] += engine.info.embedding_parameters // (1 if engine.model.config.tie_embeddings else 2)
    return [count * size for count in parameters]


def decode_engine(engine: Engine, rows: int, max_tokens: int) -> Decoded:
    """All rows together, timed from the tick in which every row decodes."""
    for index, prompt in enumerate(prompts(rows)):
        engine.submit(Request(request_id=f"{rows}-{index}", prompt=prompt, params=sampling(max_tokens)))
    per_stage = stage_weight_bytes(engine)
    generated, seconds, weights, chunks = 0, 0.0, 0, 0
    while engine.has_work:
        started = time.perf_counter()
        tick = engine.tick()
        elapsed = time.perf_counter() - started
        steps = [step for step in tick.stats.steps if step.kind in _STEP_KINDS]
        if _all_decode(tick.stats.steps, rows):
            generated += rows
            seconds += elapsed
            weights += sum(per_stage[step.stage] for step in steps)
            chunks += sum(step.rows for step in steps if step.stage == 1)
    return Decoded(generated, seconds, weights, chunks)


def _all_decode(steps: tuple[StepRecord, ...], rows: int) -> bool:
    return all(step.kind != "prefill" for step in steps) and any(
        step.kind == "byte" and step.rows == rows for step in steps
    )


def decode_one_by_one(engine: Engine, rows: int, max_tokens: int) -> float:
    """Bytes a second of stepping each row by itself, in turn; state is kept, nothing is recomputed."""
    generated, seconds = 0, 0.0
    for prompt in prompts(rows):
        engine.submit(Request(request_id="alone", prompt=prompt, params=sampling(max_tokens)))
        while engine.has_work:
            started = time.perf_counter()
            tick = engine.tick()
            if _all_decode(tick.stats.steps, 1):
                seconds += time.perf_counter() - started
                generated += 1
    return generated / seconds


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second that this process reads from a buffer of that size, with the threads torch uses: best of five."""
    buffer = torch.ones(max(num_bytes // 4, 1 << 20), dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - started))
    return best


class Server:
    """The real server process on a free port of the loopback."""

    def __init__(self, model: str, port: int, threads: int | None) -> None:
        self.port = port
        environment = dict(os.environ)
        command = [sys.executable, "-m", "server.cli.main", "serve"]
        command += [] if model == "demo" else [model]
        command += ["--port", str(port), "--log-level", "error", "--max-model-len", "2048"]
        command += ["--threads", str(threads)] if threads else []
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def wait(self, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError("the server was not ready in time")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def benchmark(model: str, row_counts: list[int], max_tokens: int, naive_tokens: int, threads: int | None) -> list[Row]:
    engine = Engine.from_pretrained(
        None if model == "demo" else model,
        engine_config=EngineConfig(max_num_seqs=max(row_counts), max_model_len=2048, threads=threads),
    )
    weight_bytes = sum(stage_weight_bytes(engine))
    decode_engine(engine, 1, 8)  # warm up
    bandwidths = [read_bandwidth(weight_bytes)]
    results: dict[int, tuple[float, Decoded]] = {}
    for rows in row_counts:
        naive = decode_one_by_one(engine, min(rows, 4), naive_tokens)
        results[rows] = naive, decode_engine(engine, rows, max_tokens)
        bandwidths.append(read_bandwidth(weight_bytes))
    bandwidth = max(bandwidths)
    dtype = engine.info.dtype
    del engine

    http: dict[int, float] = {}
    server = Server(model, free_port(), threads)
    try:
        server.wait()
        asyncio.run(run_streams(server.port, prompts(1), 8))
        for rows in row_counts:
            load = asyncio.run(run_streams(server.port, prompts(rows), max_tokens))
            http[rows] = load.generated / load.seconds
    finally:
        server.stop()

    table, report = [], []
    for rows, (naive, decoded) in results.items():
        roofline = bandwidth / (decoded.weight_bytes / decoded.generated)
        per_chunk = decoded.generated / decoded.chunks if decoded.chunks else float("nan")
        prefix = f"{model} {dtype} rows={rows}"
        report += [
            Row(f"{prefix} one by one", naive, "bytes/s"),
            Row(f"{prefix} engine", decoded.rate, "bytes/s", f"{prefix} one by one", decoded.rate / naive),
            Row(f"{prefix} http", http[rows], "bytes/s", f"{prefix} engine", http[rows] / decoded.rate),
            Row(f"{prefix} roofline", roofline, "bytes/s", f"{prefix} engine", roofline / decoded.rate),
        ]
        table.append(
            [
                str(rows),
                f"{naive:.0f}",
                f"{decoded.rate:.0f}",
                f"{decoded.rate / naive:.2f}×",
                f"{http[rows]:.0f}",
                f"{http[rows] / decoded.rate:.2f}",
                f"{roofline:.0f}",
                f"{decoded.rate / roofline:.2f}",
                f"{per_chunk:.1f}",
            ]
        )
    print_table(
        f"{model}, {dtype}: bytes/s ({bandwidth / 1e9:.1f} GB/s measured; HTTP includes prefill and the client)",
        ["rows", "one by one", "engine", "÷ one by one", "HTTP", "÷ engine", "roofline", "engine ÷ it", "bytes/chunk"],
        table,
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="demo, random:NAME or a directory; may be given again")
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--max-tokens", type=int, help="bytes a row (default 256, or 24 from 100M parameters)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the engine's own choice)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = [int(part) for part in options.rows.split(",")]
    report: list[Row] = []
    for model in options.model or ["demo", "random:hnet_1stage_L"]:
        large = model != "demo"
        max_tokens = options.max_tokens or (24 if large else 256)
        report += benchmark(model, rows, max_tokens, min(max_tokens, 16 if large else 128), options.threads)
    if options.json:
        write_json(options.json, "decode", report)


if __name__ == "__main__":
    main()
