"""Bytes decoded a second: the engine, the server over HTTP, the one-row-at-a-time loop, and the roofline.

    hnet bench decode [--model demo] [--rows 1,4,16,64] [--quantization int8] [--bytes-per-chunk 4.8] [--json FILE]

All figures of a model come from one run and are given as ratios to the naive loop of the same row
count: the same runtime stepping one row after the other, which is what a script without batching does
(it keeps all state and recomputes nothing). The roofline is the time to read the weights that the engine's steps
really read (a stage's weights once for every step that reached it) at the bandwidth measured around the run, with a
buffer as large as the weights. With --bytes-per-chunk boundaries are drawn at that mean; the server knows no such
thing, so HTTP is left out. For the demo model the step of one row is also put beside plain torch, eager and compiled.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.bandwidth import read_bandwidth
from benchmarks.http_load import run_streams
from benchmarks.models import Variant, build, read_weights, stage_bytes
from benchmarks.report import Row, finish, numbers, options_parser, print_table
from benchmarks.server_process import free_port, our_server
from benchmarks.step import compare_steps
from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.engine.building import default_threads
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Request, SamplingParams, Tick
from hnet_runtime.model.native import NativeHNet

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


def weights_of(engine: Engine) -> list[int]:
    """Bytes of weights that a step of each stage reads."""
    if isinstance(engine.model, NativeHNet):
        return stage_bytes(engine.model)
    parameters = list(engine.model.config.parameters_per_stage)
    parameters[0] += VOCAB_SIZE * engine.model.config.d_model
    return [count * engine.model.dtype.itemsize for count in parameters]


def decode_engine(engine: Engine, rows: int, max_tokens: int) -> Decoded:
    """All rows together, timed from the tick in which every row decodes until the first one ends."""
    for index, prompt in enumerate(prompts(rows)):
        engine.submit(Request(request_id=f"{rows}-{index}", prompt=prompt, params=sampling(max_tokens)))
    per_stage = weights_of(engine)
    generated, seconds, weights, chunks = 0, 0.0, 0, 0
    ended = 0
    while engine.has_work:
        started = time.perf_counter()
        tick = engine.tick()
        elapsed = time.perf_counter() - started
        ended += sum(output.finish_reason is not None for output in tick.outputs)
        if not ended and _all_decode(tick, rows):
            generated += sum(len(output.data) for output in tick.outputs)
            seconds += elapsed
            # The decoders that a fired stage runs for its rows are left out of what is read.
            weights += sum(per_stage[step.stage] for step in tick.stats.steps)
            chunks += sum(step.rows for step in tick.stats.steps if step.stage == 1)
    return Decoded(generated, seconds, weights, chunks)


def _all_decode(tick: Tick, rows: int) -> bool:
    steps = tick.stats.steps
    return tick.stats.running == rows and bool(steps) and all(step.kind in _STEP_KINDS for step in steps)


def decode_one_by_one(engine: Engine, rows: int, max_tokens: int) -> float:
    """Bytes a second of stepping each row by itself, in turn; state is kept, nothing is recomputed."""
    generated, seconds = 0, 0.0
    for prompt in prompts(rows):
        engine.submit(Request(request_id="alone", prompt=prompt, params=sampling(max_tokens)))
        while engine.has_work:
            started = time.perf_counter()
            tick = engine.tick()
            if _all_decode(tick, 1):
                seconds += time.perf_counter() - started
                generated += 1
    return generated / seconds


def make_engine(model: str, variant: Variant, threads: int | None, row_counts: list[int]) -> Engine:
    """An engine on the model, which an override of the router's verdict has to be built by hand."""
    engine_config = EngineConfig(
        max_num_seqs=max(row_counts),
        max_model_len=2048,
        threads=threads,
        kernels=variant.kernels,
        quantization=variant.quantization,
    )
    if variant.bytes_per_chunk is None:
        source = None if model == "demo" else model
        return Engine.from_pretrained(source, dtype=variant.dtype, engine_config=engine_config)
    config, weights = read_weights(model, variant.dtype)
    used = replace(variant, threads=threads or default_threads(config))
    return Engine(build(config, weights, used), model, engine_config)


def benchmark(model: str, variant: Variant, row_counts: list[int], max_tokens: int, threads: int | None) -> list[Row]:
    engine = make_engine(model, variant, threads, row_counts)
    weight_bytes = sum(weights_of(engine))
    decode_engine(engine, 1, 8)  # warm up
    used = engine.model.threads if isinstance(engine.model, NativeHNet) else torch.get_num_threads()
    bandwidths = [read_bandwidth(weight_bytes, used)]
    results: dict[int, tuple[float, Decoded]] = {}
    for rows in row_counts:
        naive = decode_one_by_one(engine, min(rows, 4), max_tokens)
        results[rows] = naive, decode_engine(engine, rows, max_tokens)
        bandwidths.append(read_bandwidth(weight_bytes, used))
    bandwidth = max(bandwidths)
    dtype, kernels = engine.info.dtype, engine.info.kernels
    del engine

    http: dict[int, float] = {}
    if variant.bytes_per_chunk is None:  # serving knows no override
        options = ["--kernels", variant.kernels, "--dtype", variant.dtype]
        options += ["--quantization", variant.quantization] if variant.quantization else []
        options += ["--threads", str(threads)] if threads else []
        with our_server(model, free_port(), *options) as server:
            server.wait()
            asyncio.run(run_streams(server.port, prompts(1), 8))
            for rows in row_counts:
                load = asyncio.run(run_streams(server.port, prompts(rows), max_tokens))
                http[rows] = load.generated / load.seconds

    table, report = [], []
    for rows, (naive, decoded) in results.items():
        roofline = bandwidth / (decoded.weight_bytes / decoded.generated)
        per_chunk = decoded.generated / decoded.chunks if decoded.chunks else float("nan")
        prefix = f"{model} {variant.quantization or dtype} rows={rows}"
        report += [
            Row(f"{prefix} one by one", naive, "bytes/s"),
            Row(f"{prefix} engine", decoded.rate, "bytes/s", f"{prefix} one by one", decoded.rate / naive),
            Row(f"{prefix} roofline", roofline, "bytes/s", f"{prefix} engine", roofline / decoded.rate),
        ]
        if rows in http:
            share = http[rows] / decoded.rate
            report.append(Row(f"{prefix} http", http[rows], "bytes/s", f"{prefix} engine", share))
        table.append(
            [
                str(rows),
                f"{naive:.0f}",
                f"{decoded.rate:.0f}",
                f"{decoded.rate / naive:.2f}×",
                f"{http[rows]:.0f}" if rows in http else "–",
                f"{http[rows] / decoded.rate:.2f}" if rows in http else "–",
                f"{roofline:.0f}",
                f"{decoded.rate / roofline:.2f}",
                f"{per_chunk:.1f}",
            ]
        )
    title = f"{model}, {dtype}, {kernels}, {used} thread(s), {bandwidth / 1e9:.1f} GB/s read: bytes/s"
    print_table(
        title + " (HTTP with prefill and the client)",
        ["rows", "one by one", "engine", "÷ one by one", "HTTP", "÷ engine", "roofline", "engine ÷ it", "bytes/chunk"],
        table,
    )
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--max-tokens", type=int, help="bytes a row (default 256, or 24 from 100M parameters)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the engine's own choice)")
    parser.add_argument("--no-compare", action="store_true", help="leave out the demo's step against plain torch")
    options = parser.parse_args(arguments)
    variant = Variant(options.dtype, options.kernels, options.quantization, 1, options.bytes_per_chunk)
    report: list[Row] = []
    for model in options.model or ["demo", "random:hnet_1stage_L"]:
        large = model != "demo"
        max_tokens = options.max_tokens or (24 if large else 256)
        report += benchmark(model, variant, numbers(options.rows), max_tokens, options.threads)
        if not large and not options.no_compare:
            report += compare_steps(model, replace(variant, bytes_per_chunk=None), 512)
    finish("decode", report, options.json)


if __name__ == "__main__":
    main()
