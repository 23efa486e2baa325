"""A text read on the device, byte by byte and whole, beside the same text read on the CPU in fp32; and alone beside in
a crowd. What a reader is compared by, `comparison` says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.checkpoint import locate
from hnet_runtime.comparison import Difference, Reading, Tolerance, Trace, compare
from hnet_runtime.engine.building import load_model
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.gpu_doctor.checks import Check, Outcome, Settings
from hnet_runtime.gpu_doctor.device import Device
from hnet_runtime.gpu_doctor.models import model_on, rows_of, texts, weights_of
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.parity import BFLOAT16, read_by

PIECE = 500
"""Bytes of each text: after a flip everything differs, so many short texts say more than a long one."""

COMPANY = 7
"""Rows beside the one that is looked at."""

FLOAT32 = Tolerance(max_abs=2e-2, p_max_abs=1e-3, flips=1e-3)
"""fp32 on both sides: sums in another order. A boundary may flip at a tie alone."""

ALONE = {
    torch.float32: Tolerance(max_abs=2e-2, same_argmax=0.999, p_max_abs=1e-3, flips=1e-3),
    torch.bfloat16: Tolerance(rms=0.5, same_argmax=0.9, p_rms=0.05, flips=0.05),
}
"""A library's products may depend on how many rows there are."""

_SHARE = 0.8  # of the group's time for reading; what was not read by then is told


def flips(device: Device, settings: Settings) -> Iterator[Check]:
    """Boundaries that the device and the CPU in fp32 do not agree on."""
    data = texts(-(-settings.text_bytes // PIECE), min(PIECE, settings.text_bytes))
    source = locate(settings.model, settings.config)
    cpu: list[Reading] = []

    def truth() -> Reading:
        if not cpu:
            cpu.append(read_by(load_model(source, torch.float32, torch.device("cpu"), EngineConfig())))
        return cpu[0]

    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        model = _Lazy(device, settings, dtype)
        name = str(dtype).removeprefix("torch.")
        ways: dict[str, Callable[[], Reading]] = {
            "in one piece": lambda model=model: read_by(model()),  # type: ignore[misc]
            "step by step": lambda model=model: model.stepper(1).read,  # type: ignore[misc]
        }
        for way, reader in ways.items():
            run = partial(_compared, truth, reader, data, tolerance, settings.limit_seconds * _SHARE / 4)
            yield Check(f"CPU float32 against {name} {way}", run, str(tolerance))


def crowd(device: Device, settings: Settings) -> Iterator[Check]:
    """Rows alone and in company: what they read, and what they write."""
    data = texts(1 + COMPANY, min(PIECE, settings.text_bytes))
    for dtype, tolerance in ALONE.items():
        model = _Lazy(device, settings, dtype)
        name = str(dtype).removeprefix("torch.")

        def alone(model: _Lazy = model) -> Reading:
            return model.stepper(1 + COMPANY).read

        def together(model: _Lazy = model) -> Reading:
            return partial(model.stepper(1 + COMPANY).read, company=data[1:])

        run = partial(_compared, alone, together, data[:1], tolerance, settings.limit_seconds)
        yield Check(f"{name}: a text alone and among {COMPANY} others", run, str(tolerance))
    same = partial(
        _written,
        _Lazy(device, settings, torch.float32),
        [text[:40] for text in data],
        min(settings.completion_bytes, 64),
    )
    yield Check("float32: bytes written alone and in a crowd", same, "the same bytes and boundaries")


class _Lazy:
    """MODEL on the device, loaded when it is first asked for."""

    def __init__(self, device: Device, settings: Settings, dtype: torch.dtype) -> None:
        self._device, self._settings, self._dtype = device, settings, dtype
        self._model: CapturedHNet | None = None
        self._steppers: dict[int, Stepper] = {}

    def __call__(self) -> CapturedHNet:
        if self._model is None:
            config, weights = weights_of(self._settings, self._dtype, self._device.device)
            self._model = model_on(self._device, config, weights, most_graphs=self._settings.max_graphs)
        return self._model

    def stepper(self, rows: int) -> Stepper:
        if rows not in self._steppers:
            self._steppers[rows] = Stepper(self(), rows)
        return self._steppers[rows]


class Stepper:
    """Rows that take a byte a step, all stages at once, from texts of at most PIECE bytes."""

    def __init__(self, model: CapturedHNet, rows: int) -> None:
        self._model, self._state = model, rows_of(model, rows, PIECE)

    def read(self, data: bytes, company: Sequence[bytes] = ()) -> Trace:
        """What row 1 makes of a text while other rows read others; where those end, they begin anew."""
        self._state.reset(list(range(1, 2 + len(company))))
        logits: list[Tensor] = []
        p: list[dict[int, float]] = [{} for _ in range(self._model.config.num_routed_stages)]
        opened: list[set[int]] = [set() for _ in p]
        for turn, byte in enumerate(data):
            fed = [byte, *(text[turn % len(text)] for text in company)]
            # Row 1 stands last as often as first: a row's place is nothing that counts.
            rows = list(range(1, 1 + len(fed)))
            order = rows if turn % 2 else rows[::-1]
            result = self._model.step(self._state, order, bytes(fed[row - 1] for row in order), parks=False)
            logits.append(result.logits[order.index(1)].float().cpu())
            for stage, said in result.verdicts:
                for place in np.flatnonzero(said.rows == 1).tolist():
                    offset = int(said.offsets[place])
                    p[stage][offset] = float(said.p[place])
                    opened[stage] |= {offset} if said.boundary[place] else set()
        return Trace(torch.stack(logits), tuple(p), tuple(frozenset(each) for each in opened))

    def write(self, prompts: Sequence[bytes], count: int) -> list[tuple[bytes, tuple[tuple[int, int], ...]]]:
        """The most probable bytes after each prompt, all prompts beside each other, and where chunks opened: (stage,
        offset). Prompts of one length."""
        rows = list(range(1, 1 + len(prompts)))
        self._state.reset(rows)
        texts = [bytearray(prompt) for prompt in prompts]
        opened: list[list[tuple[int, int]]] = [[] for _ in prompts]
        for turn in range(len(prompts[0]) + count - 1):
            result = self._model.step(self._state, rows, bytes(text[turn] for text in texts), parks=False)
            for stage, said in result.verdicts:
                for row, offset in zip(
                    said.rows[said.boundary].tolist(), said.offsets[said.boundary].tolist(), strict=True
                ):
                    opened[row - 1].append((stage, offset))
            if turn >= len(prompts[0]) - 1:
                for text, byte in zip(texts, result.logits.argmax(-1).tolist(), strict=True):
                    text.append(byte)
        return [(bytes(text), tuple(each)) for text, each in zip(texts, opened, strict=True)]


def _written(model: _Lazy, prompts: list[bytes], count: int) -> Outcome:
    stepper = model.stepper(len(prompts))
    together = stepper.write(prompts, count)
    other = [index for index, prompt in enumerate(prompts) if stepper.write([prompt], count)[0] != together[index]]
    return Outcome(
        not other, f"{len(other)} of {len(prompts)} rows differ", {"rows": len(prompts), "differ": len(other)}
    )


def _compared(
    expected: Callable[[], Reading],
    found: Callable[[], Reading],
    data: list[bytes],
    tolerance: Tolerance,
    seconds: float,
) -> Outcome:
    """Text after text, as many as there is time for, and one at least."""
    one, other = expected(), found()
    parts: list[Difference] = []
    began = time.monotonic()
    for text in data:
        parts.append(compare(one, other, text))
        if time.monotonic() - began > seconds:
            break
    apart = together(parts)
    counted = ", ".join(f"{flips} of {count}" for flips, count in zip(apart.flips, apart.positions, strict=True))
    read = sum(len(text) for text in data[: len(parts)])
    said = (
        f"{read} bytes: boundaries flipped {counted or 'none, there is no router'}; max |Δ p| {apart.p_max_abs:.2g}, "
        f"max |Δ logit| {apart.max_abs:.2g}, same best byte {apart.same_argmax:.2%}"
    )
    figures = {
        "bytes": read,
        "flips": list(apart.flips),
        "positions": list(apart.positions),
        "p_max_abs": apart.p_max_abs,
        "p_rms": apart.p_rms,
        "logit_max_abs": apart.max_abs,
        "logit_rms": apart.rms,
        "same_argmax": apart.same_argmax,
        "bits_per_byte": list(apart.bits_per_byte),
        "bitwise": apart.bitwise,
    }
    return Outcome(tolerance.allows(apart), said, figures)


def together(parts: Sequence[Difference]) -> Difference:
    """The differences of several texts as that of one, each weighing as much as it has positions."""
    weights = [part.compared for part in parts]
    asked = [sum(part.positions) for part in parts]

    def mean(values: list[float], by: list[int]) -> float:
        return sum(value * weight for value, weight in zip(values, by, strict=True) if weight) / max(sum(by), 1)

    def rms(values: list[float], by: list[int]) -> float:
        return math.sqrt(mean([value**2 for value in values], by))

    return Difference(
        compared=sum(weights),
        max_abs=max(part.max_abs for part in parts),
        rms=rms([part.rms for part in parts], weights),
        same_argmax=mean([part.same_argmax for part in parts], weights),
        p_max_abs=max(part.p_max_abs for part in parts),
        p_rms=rms([part.p_rms for part in parts], asked),
        flips=tuple(map(sum, zip(*(part.flips for part in parts), strict=True))),
        positions=tuple(map(sum, zip(*(part.positions for part in parts), strict=True))),
        bits_per_byte=(
            mean([part.bits_per_byte[0] for part in parts], weights),
            mean([part.bits_per_byte[1] for part in parts], weights),
        ),
        bitwise=all(part.bitwise for part in parts),
    )
