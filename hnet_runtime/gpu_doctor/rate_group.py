"""Bytes a second of the whole engine by rows, in lock-step and aligned, beside what a roofline gives; first byte, and
what capturing took. Nothing here is too slow to pass: it fails where rows do not come to their end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Literal

import torch

from hnet_runtime.checkpoint import locate
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Request, SamplingParams, Usage
from hnet_runtime.gpu_doctor.checks import Check, Outcome, Settings
from hnet_runtime.gpu_doctor.device import Device
from hnet_runtime.gpu_doctor.models import model_on, texts, weights_of

Policy = Literal["lockstep", "aligned"]
POLICIES: tuple[Policy, ...] = ("lockstep", "aligned")
_PROMPT = 64


def checks(device: Device, settings: Settings) -> Iterator[Check]:
    """For each policy: capturing, then the rows, most first."""
    measured = _Measured(device)
    for policy in POLICIES:
        running = _Running(device, settings, policy, measured)
        yield Check(f"{policy}: capture", running.capture)
        for rows in sorted(settings.rows, reverse=True):
            yield Check(f"{policy}: {rows} rows", partial(running.decode, rows), f"{rows} rows come to their end")


class _Measured:
    """The device's bandwidth, measured once."""

    def __init__(self, device: Device) -> None:
        self._device = device

    @cached_property
    def bandwidth(self) -> float:
        return self._device.copy_bandwidth()


class _Running:
    """An engine on MODEL with room for the most rows; made when first used."""

    def __init__(self, device: Device, settings: Settings, policy: Policy, measured: _Measured) -> None:
        self._device, self._settings, self._policy, self._measured = device, settings, policy, measured
        self._turn = 0

    @cached_property
    def _engine(self) -> Engine:
        config, weights = weights_of(self._settings, torch.bfloat16, self._device.device)
        model = model_on(self._device, config, weights, most_graphs=self._settings.max_graphs)
        length = _PROMPT + self._settings.completion_bytes
        return Engine(
            model,
            config=EngineConfig(
                max_num_seqs=max(self._settings.rows),
                max_model_len=length,
                batching=self._policy,
                prefix_cache_memory=0,
            ),
        )

    def capture(self) -> Outcome:
        info = self._engine.info
        said = f"{info.num_graphs} steps in {info.capture_seconds:.2f} s and {info.capture_bytes / 2**20:.1f} MiB"
        return Outcome(
            info.num_graphs > 0,
            said,
            {"graphs": info.num_graphs, "seconds": info.capture_seconds, "bytes": info.capture_bytes},
        )

    def decode(self, rows: int) -> Outcome:
        """Rates count from the first tick after all rows have begun to the first in which one has ended."""
        engine, count = self._engine, self._settings.completion_bytes
        params = SamplingParams(max_tokens=count, temperature=1.0, ignore_eos=True, utf8="raw")
        self._turn += 1
        began = time.perf_counter()
        for index, prompt in enumerate(texts(rows, _PROMPT)):
            engine.submit(Request(request_id=f"{self._turn}-{index}", prompt=prompt, params=params))
        written: dict[str, int] = {}
        ended: dict[str, Usage] = {}
        first_byte: float | None = None
        start: tuple[float, int] | None = None
        rate = 0.0
        while engine.has_work:
            for output in engine.tick().outputs:
                if output.error:
                    raise AssertionError(f"a row ended with an error: {output.error}")
                written[output.request_id] = written.get(output.request_id, 0) + len(output.data)
                if output.finish_reason is not None and output.usage is not None:
                    ended[output.request_id] = output.usage
            now, total = time.perf_counter(), sum(written.values())
            if first_byte is None and total:
                first_byte = now - began
            if start is None and len(written) == rows:
                start = now, total
            elif start is not None and (not ended or not rate) and now > start[0]:
                rate = (total - start[1]) / (now - start[0])
        complete = len(ended) == rows and all(size == count for size in written.values())
        chunk_lengths = _chunk_lengths(list(ended.values()))
        expected, why = self._expected(rows, chunk_lengths)
        said = f"{rate:.0f} bytes/s, first byte after {1e3 * (first_byte or 0.0):.1f} ms; "
        said += f"expected at most {expected:.0f} ({rate / expected:.1%} of it)" if expected else why
        figures: dict[str, Any] = {
            "policy": self._policy,
            "rows": rows,
            "bytes_per_second": rate,
            "expected_bytes_per_second": expected,
            "first_byte_seconds": first_byte,
            "bytes_per_chunk": chunk_lengths,
        }
        return Outcome(complete, said, figures)

    def _expected(self, rows: int, chunk_lengths: list[float]) -> tuple[float | None, str]:
        """What the roofline gives on the measured bandwidth at the chunks that came, or why it gives nothing."""
        try:
            from hnet_runtime.gpu_roofline import expected_rate
        except ImportError as error:
            return None, f"no expectation: {error}"
        config = locate(self._settings.model, self._settings.config).config
        expect: Callable[..., float] = expected_rate
        try:
            rate = expect(
                config,
                rows,
                bandwidth=self._measured.bandwidth,
                policy=self._policy,
                bytes_per_chunk=chunk_lengths or None,
                context=_PROMPT + self._settings.completion_bytes // 2,
            )
        except (ImportError, ValueError) as error:
            return None, f"no expectation: {error}"
        return rate, ""


def _chunk_lengths(usages: list[Usage]) -> list[float]:
    """Positions in a chunk, of each routed stage."""
    counts = [sum(usage.prompt_bytes + usage.completion_bytes for usage in usages)]
    counts += [sum(each) for each in zip(*(usage.chunks for usage in usages), strict=True)]
    return [before / max(after, 1) for before, after in pairwise(counts)]
