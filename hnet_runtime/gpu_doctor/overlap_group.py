"""An engine that launches steps before the ones before are read, beside one that does not: what requests get must be
the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from msgspec.structs import replace

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Completion, Engine
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.gpu_doctor.checks import Check, Outcome, Settings
from hnet_runtime.gpu_doctor.device import Device
from hnet_runtime.gpu_doctor.models import model_on, texts, weights_of

_ROWS, _PROMPT = 8, 40
_PAUSES = tuple(bytes((101, last)) for last in range(97, 123))  # stop strings of which every letter may be the end


def checks(device: Device, settings: Settings) -> Iterator[Check]:
    """In bf16 of rows that run to their ends: the steps are then the same ones. In fp32 also of rows that pause and end
    on their way, which have others run beside other company for a step."""
    for dtype, pauses, demand in (
        (torch.bfloat16, False, "the same bytes, chunks and their probabilities, to the bit"),
        (torch.float32, True, "the same bytes and chunks"),
    ):
        name = str(dtype).removeprefix("torch.")
        kind = "rows that pause and end" if pauses else "rows that run to their ends"
        yield Check(f"{name}: {kind}", partial(_compare, device, settings, dtype, pauses), demand)


def _compare(device: Device, settings: Settings, dtype: torch.dtype, pauses: bool) -> Outcome:
    without, slow, none = _run(device, settings, dtype, pauses, overlap=False)
    found, fast, overlapped = _run(device, settings, dtype, pauses, overlap=True)
    wrong = [
        index
        for index, pair in enumerate(zip(found, without, strict=True))
        if _substance(pair[0], not pauses) != _substance(pair[1], not pauses)
    ]
    said = f"{len(wrong)} of {len(found)} rows differ; {overlapped} steps launched ahead; {fast:.0f} bytes/s with it, "
    said += f"{slow:.0f} without"
    figures = {"differ": wrong, "overlapped": overlapped, "bytes_per_second": fast, "bytes_per_second_without": slow}
    return Outcome(not wrong and overlapped > 0 and not none, said, figures)


def _run(
    device: Device, settings: Settings, dtype: torch.dtype, pauses: bool, *, overlap: bool
) -> tuple[list[Completion], float, int]:
    """What each row got, bytes a second, and steps that were launched ahead."""
    config, weights = weights_of(settings, dtype, device.device)
    model = model_on(device, config, weights, most_graphs=settings.max_graphs)
    length = settings.completion_bytes
    engine = Engine(
        model,
        config=EngineConfig(
            max_num_seqs=_ROWS,
            max_model_len=_PROMPT + length,
            batching="lockstep",
            prefix_cache_memory=0,
            overlap=overlap,
        ),
    )
    asked = [
        SamplingParams(
            max_tokens=max(length - row % 3, 1),
            temperature=0.4 * row,
            seed=row,
            ignore_eos=True,
            return_chunks=True,
        )
        for row in range(_ROWS)
    ]
    if pauses:
        asked = [replace(each, stop=_PAUSES, ignore_eos=False) if row % 2 else each for row, each in enumerate(asked)]
    began = time.perf_counter()
    completions = engine.generate(texts(_ROWS, _PROMPT), asked)
    seconds = time.perf_counter() - began
    return (
        completions,
        sum(len(each.data) for each in completions) / seconds,
        engine.tick().stats.overlapped_ticks_total,
    )


def _substance(completion: Completion, with_p: bool) -> tuple[object, ...]:
    chunks = [(chunk.stage, chunk.start, chunk.p if with_p else None) for chunk in completion.chunks]
    return completion.data, completion.finish_reason, completion.stop_reason, completion.error, chunks
