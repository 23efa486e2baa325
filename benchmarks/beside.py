"""Prompts beside running streams: what a long one does to the streams' gaps, and what a short one waits behind it.

    hnet bench beside [--model demo] [--streams 8] [--long-bytes 4096] [--json FILE]

Streams run on an engine without a prefix cache; then a short prompt comes, then a long one, and then another long one
with a short one right behind it. Gaps are those between two bytes of a stream, alone and while the long prompt is read;
the time to first byte of the short prompt behind a long one is put beside that of the one that came to the streams
alone. All with half of the time for prompts (`prefill_share` 0.5, the default) and with no such bound (1.0).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from benchmarks.models import BOS, Network, Variant, build, read_weights, text
from benchmarks.policy_sim import quantile
from benchmarks.report import Row, finish, options_parser, print_table
from benchmarks.roofline import BYTES_PER_CHUNK
from hnet_runtime.engine.building import default_threads
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Request, SamplingParams

SHARES = (0.5, 1.0)
SHORT = 100  # bytes
WARM_UP = 32  # bytes of each stream before anything is timed


@dataclass(frozen=True)
class Beside:
    """Seconds: between two bytes of a stream, alone and while a long prompt is read; to the first byte of a short
    prompt beside streams, and beside streams and a long prompt; and the long prompt's reading."""

    alone: tuple[float, ...]
    beside: tuple[float, ...]
    short_alone: float
    short_beside: float
    reading: float


class _Streams:
    """Streams that run on and on, a clock of their bytes, and what else is asked for."""

    def __init__(self, model: Network, name: str, streams: int, length: int, share: float, threads: int) -> None:
        config = EngineConfig(
            max_num_seqs=streams + 2,
            max_model_len=length,
            threads=threads,
            prefill_share=share,
            prefix_cache_memory=0,
        )
        self.engine = Engine(model, name, config)
        self._seen: dict[str, int] = {}  # bytes of each request so far
        self._last: dict[str, float] = {}
        self.gaps: list[float] = []
        self.first: dict[str, float] = {}
        for index in range(streams):
            self.submit(f"stream {index}", text(16, index), length - 16)
        while min(self._counts().values(), default=0) < WARM_UP:
            self.tick()
        self.gaps.clear()

    def submit(self, request_id: str, prompt: bytes, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, utf8="raw")
        self.engine.submit(Request(request_id=request_id, prompt=prompt, params=params))
        self._seen[request_id] = 0

    def tick(self) -> None:
        tick = self.engine.tick()
        now = time.perf_counter()
        for output in tick.outputs:
            if not output.data:
                continue
            self._seen[output.request_id] += len(output.data)
            self.first.setdefault(output.request_id, now)
            if output.request_id.startswith("stream"):
                if output.request_id in self._last:
                    self.gaps.append(now - self._last[output.request_id])
                self._last[output.request_id] = now

    def until_first(self, request_id: str) -> float:
        """Ticks until a request has its first byte; seconds from now."""
        started = time.perf_counter()
        while request_id not in self.first:
            self.tick()
        return self.first[request_id] - started

    def _counts(self) -> dict[str, int]:
        return {name: count for name, count in self._seen.items() if name.startswith("stream")}


def measure(model: Network, name: str, streams: int, long_bytes: int, share: float, threads: int) -> Beside:
    length = long_bytes + 4096
    long_prompt, short_prompt = text(long_bytes, 77), BOS + b"s" * (SHORT - 1)
    run = _Streams(model, name, streams, length, share, threads)
    for _ in range(200):
        run.tick()
    alone = tuple(run.gaps)
    run.submit("short alone", short_prompt, 1)
    short_alone = run.until_first("short alone")
    run.gaps.clear()
    run.submit("long", long_prompt, 1)
    reading = run.until_first("long")
    beside = tuple(run.gaps)
    run.submit("second long", text(long_bytes, 78), 1)
    run.submit("short beside", short_prompt, 1)
    return Beside(alone, beside, short_alone, run.until_first("short beside"), reading)


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--long-bytes", type=int, default=4096)
    options = parser.parse_args(arguments)
    report: list[Row] = []
    for name in options.model or ["demo"]:
        config, weights = read_weights(name, options.dtype)
        chunking = options.bytes_per_chunk
        if chunking is None and name.startswith("random:"):
            chunking = BYTES_PER_CHUNK.get(config.num_routed_stages)
        threads = default_threads(config)
        variant = Variant(options.dtype, options.kernels, options.quantization, threads, chunking)
        model = build(config, weights, variant)
        lines: list[list[str]] = []
        for share in SHARES:
            found = measure(model, name, options.streams, options.long_bytes, share, threads)
            base = median(found.alone)
            prefix = f"{name} share={share:g}"
            report.append(Row(f"{prefix} gap alone", 1e3 * base, "ms", f"{prefix} gap alone", 1.0))
            line = [f"{share:g}", f"{1e3 * base:.2f}"]
            for word, value in (
                ("p50", median(found.beside)),
                ("p99", quantile(sorted(found.beside), 0.99)),
                ("longest", max(found.beside)),
            ):
                report.append(Row(f"{prefix} {word} beside", 1e3 * value, "ms", f"{prefix} gap alone", value / base))
                line.append(f"{value / base:.1f}×")
            report += [
                Row(f"{prefix} short alone", 1e3 * found.short_alone, "ms"),
                Row(
                    f"{prefix} short beside",
                    1e3 * found.short_beside,
                    "ms",
                    f"{prefix} short alone",
                    found.short_beside / found.short_alone,
                ),
                Row(f"{prefix} reading", 1e3 * found.reading, "ms"),
            ]
            line += [f"{1e3 * found.short_alone:.1f}", f"{found.short_beside / found.short_alone:.1f}×"]
            lines.append([*line, f"{found.reading:.2f}"])
        columns = ["share", "gap alone, ms", "p50", "p99", "longest", "short, ms", "beside a long one", "long read, s"]
        title = f"{name}: {options.streams} streams, a prompt of {options.long_bytes} bytes; gaps ÷ those alone"
        print_table(title, columns, lines)
    finish("beside", report, options.json)


if __name__ == "__main__":
    main()
