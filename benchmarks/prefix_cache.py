"""A prefix that many requests share: time to first byte where it is cached and where it is not, and what it takes.

    hnet bench prefix [--model demo] [--prefix-bytes 1024] [--requests 32] [--json FILE]

Requests come one after the other to idle engines on one model: each a prefix of 1 KiB and a suffix of its own. Every
request goes to an engine without a cache (a miss) and to one with it (a hit), in turn. Two requests before those that
count read the prefix and show where others part from it, so that a snapshot is kept there. Time is from submission to
the first byte. What a cached prefix takes is what snapshots take after an engine has read the prefix alone, its one
snapshot taken at the end; pages of keys and values that it holds are counted by no snapshot, and not here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.models import BOS, Variant, build, read_weights
from benchmarks.report import Row, finish, options_parser, print_table
from benchmarks.roofline import BYTES_PER_CHUNK
from hnet_runtime.engine.building import default_threads
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Request, SamplingParams, Usage

MODELS = ("demo", "random:hnet_1stage_L")
PARTING = 2  # requests before those that count
COMPLETION = 4  # bytes
TARGET = 0.2  # of a miss's time to first byte
_TEXT = (
    b"You answer questions about the town's library. It opens at nine, on Sundays at noon, and closes when the last "
    b"reader has gone. Books are lent for four weeks; whoever brings one back late reads aloud from it on Friday. "
)


@dataclass(frozen=True)
class First:
    """Seconds from submission to the first byte, and what the request took."""

    seconds: float
    usage: Usage


@dataclass(frozen=True)
class Shared:
    """misses, hits: of the same requests, in order; snapshot_bytes: of one cached prefix, without its pages;
    cache_bytes: of all that the engine with the cache kept in the end."""

    prefix: int
    misses: tuple[First, ...]
    hits: tuple[First, ...]
    snapshot_bytes: int
    cache_bytes: int

    @property
    def ratio(self) -> float:
        """Time to first byte of a hit ÷ of a miss, medians."""
        return median(hit.seconds for hit in self.hits) / median(miss.seconds for miss in self.misses)

    @property
    def cached(self) -> float:
        """Median bytes of a prompt that came from the cache."""
        return median(hit.usage.cached_bytes for hit in self.hits)


def prompts(prefix: int, requests: int) -> list[bytes]:
    """`prefix` bytes that all have, and an ending that differs from its first byte on (of 256 requests at most)."""
    shared = (BOS + _TEXT * (prefix // len(_TEXT) + 1))[:prefix]
    return [shared + bytes([index]) + f" question {index}: ".encode() for index in range(requests)]


def first_byte(engine: Engine, prompt: bytes) -> tuple[First, int]:
    """Runs a request by itself; also says what snapshots take after it. Raises RuntimeError where it fails."""
    params = SamplingParams(max_tokens=COMPLETION, seed=1, ignore_eos=True, utf8="raw")
    started = time.perf_counter()
    engine.submit(Request(request_id="alone", prompt=prompt, params=params))
    seconds: float | None = None
    while True:
        tick = engine.tick()
        for output in tick.outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            if seconds is None and output.data:
                seconds = time.perf_counter() - started
            if output.usage is not None and seconds is not None:
                return First(seconds, output.usage), tick.stats.prefix_cache_bytes


def measure(model: str, variant: Variant, threads: int | None, prefix: int, requests: int) -> tuple[str, Shared]:
    """What the model is, in words, and what its requests took."""
    config, weights = read_weights(model, variant.dtype)
    chunking = variant.bytes_per_chunk
    if chunking is None and model.startswith("random:"):
        chunking = BYTES_PER_CHUNK.get(config.num_routed_stages)
    variant = replace(variant, threads=threads or default_threads(config), bytes_per_chunk=chunking)
    network = build(config, weights, variant)
    each = prompts(prefix, requests + PARTING)
    settings = EngineConfig(
        max_num_seqs=2,
        max_model_len=max(map(len, each)) + COMPLETION,
        threads=variant.threads,
        kernels=variant.kernels,
        quantization=variant.quantization,
    )
    missing = Engine(network, model, replace(settings, prefix_cache_memory=0))
    hitting = Engine(network, model, settings)
    alone = Engine(network, model, replace(settings, prefix_cache_interval=prefix + 1))
    _, snapshot_bytes = first_byte(alone, each[0][:prefix])
    del alone
    for prompt in each[:PARTING]:
        first_byte(hitting, prompt)
    first_byte(missing, each[0])  # pages are faulted in
    pairs = [(first_byte(missing, prompt), first_byte(hitting, prompt)) for prompt in each[PARTING:]]
    misses, hits = tuple(miss for (miss, _), _ in pairs), tuple(hit for _, (hit, _) in pairs)
    info = missing.info
    said = f"{model}, {variant.quantization or info.dtype}, {info.kernels}, {variant.threads} thread(s)"
    said += f", {chunking:g} bytes a chunk" if chunking is not None else ""
    return said, Shared(prefix, misses, hits, snapshot_bytes, pairs[-1][1][1])


def rows_of(name: str, shared: Shared) -> list[Row]:
    """A miss is the base."""
    miss, hit = (1e3 * median(first.seconds for first in each) for each in (shared.misses, shared.hits))
    return [
        Row(f"{name} miss", miss, "ms", f"{name} miss", 1.0),
        Row(f"{name} hit", hit, "ms", f"{name} miss", shared.ratio),
        Row(f"{name} prefix", shared.prefix, "bytes"),
        Row(f"{name} cached", shared.cached, "bytes", f"{name} prefix", shared.cached / shared.prefix),
        Row(f"{name} a cached prefix", shared.snapshot_bytes, "bytes of memory"),
        Row(f"{name} the cache in the end", shared.cache_bytes, "bytes of memory"),
    ]


def line_of(shared: Shared) -> list[str]:
    return [
        str(len(shared.hits)),
        *(f"{1e3 * median(first.seconds for first in each):.1f}" for each in (shared.misses, shared.hits)),
        f"{shared.ratio:.3f}",
        "met" if shared.ratio <= TARGET else "missed",
        f"{shared.cached:.0f} of {shared.prefix}",
        f"{shared.snapshot_bytes / 1e6:.2f}",
        f"{shared.cache_bytes / 1e6:.2f}",
    ]


COLUMNS: Sequence[str] = (
    "requests",
    "miss, ms",
    "hit, ms",
    "hit ÷ miss",
    f"≤ {TARGET:g}",
    "bytes cached",
    "MB a prefix",
    "MB in the end",
)


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--prefix-bytes", type=int, default=1024, help="bytes of the prefix, with BOS")
    parser.add_argument("--requests", type=int, help="that count (default 32 for the demo, 6 for others)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: by the model's width)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.prefix_bytes < 64:
        parser.error(f"--prefix-bytes must be at least 64, not {options.prefix_bytes}")
    if options.requests is not None and not 1 <= options.requests <= 256 - PARTING:
        parser.error(f"--requests must be 1 to {256 - PARTING}, not {options.requests}")
    report: list[Row] = []
    for model in options.model or MODELS:
        chunking = options.bytes_per_chunk if options.model or model.startswith("random:") else None
        variant = Variant(options.dtype, options.kernels, options.quantization, 1, chunking)
        requests = options.requests or (32 if model == "demo" else 6)
        said, shared = measure(model, variant, options.threads, options.prefix_bytes, requests)
        print_table(f"{said}: time to first byte", list(COLUMNS), [line_of(shared)])
        report += rows_of(f"{model} {options.quantization}" if options.quantization else model, shared)
    finish("prefix", report, options.json)


if __name__ == "__main__":
    main()
