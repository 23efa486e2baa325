"""A cold start: from the command to ready and to the first byte of a completion, and the memory that is not weights.

    hnet bench start [--model demo] [--dtype bfloat16] [--quantization int8] [--rounds 3] [--json FILE]

The server runs as `hnet serve` does. Memory is what its processes hold for themselves (private pages, once a streamed
completion has ended); weights that are mapped from a cache belong to the system and count as nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from statistics import median

from benchmarks.http_load import run_streams
from benchmarks.models import Variant, build, read_weights
from benchmarks.report import Row, finish, print_table
from benchmarks.server_process import free_port, our_server
from hnet_runtime.model.native import NativeHNet

PROMPT = b"\xfeIt was a bright cold day in April"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, random:NAME or a directory")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    network = build(
        *read_weights(options.model, options.dtype), Variant(options.dtype, quantization=options.quantization)
    )
    weights = network.weight_bytes if isinstance(network, NativeHNet) else 0
    del network
    flags = ["--dtype", options.dtype, *(["--quantization", options.quantization] if options.quantization else [])]
    ready, first, memory = [], [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        with our_server(options.model, free_port(), *flags) as server:
            ready.append(server.wait())
            load = asyncio.run(run_streams(server.port, [PROMPT], 64))
            first.append(time.perf_counter() - started - load.seconds + load.first)
            memory.append(server.private_bytes())
    beyond = median(memory) - weights
    print_table(
        f"{options.model}: a cold start, {weights / 1e6:.0f} MB of packed weights",
        ["", ""],
        [
            ["ready, s", f"{median(ready):.2f}"],
            ["first byte, s", f"{median(first):.2f}"],
            ["memory of all processes, MB", f"{median(memory) / 1e6:.0f}"],
            ["beyond the weights, MB", f"{beyond / 1e6:.0f}"],
        ],
    )
    report = [
        Row("ready", median(ready), "s"),
        Row("first byte", median(first), "s", "ready", median(first) / median(ready)),
        Row("memory", median(memory), "bytes"),
        Row("beyond the weights", beyond, "bytes", "memory", beyond / median(memory)),
    ]
    finish("start", report, options.json)


if __name__ == "__main__":
    main()
