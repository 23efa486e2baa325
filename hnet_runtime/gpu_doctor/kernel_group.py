"""Every kernel of steps and of prefill beside its twin in torch, on the device, at the official models' sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hnet_runtime.gpu_doctor import kernel_cases, prefill_cases
from hnet_runtime.gpu_doctor.checks import Check, Outcome, Settings
from hnet_runtime.gpu_doctor.closeness import BF16_ULP
from hnet_runtime.gpu_doctor.device import Device
from hnet_runtime.gpu_doctor.kernel_cases import StepCase, step_cases
from hnet_runtime.gpu_doctor.prefill_cases import PrefillCase
from hnet_runtime.gpu_doctor.prefill_cases import prefill_cases as cases_of_prefill
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.prefill import PrefillOps

STEP = 1e-5
"""Of the largest number: a device's exponentials and sums beside the twin's, as large as what a step sums over."""

PREFILL = 4e-5
"""The same; products of fp32 operands are split on tensor cores."""

ROUNDED = 2.0**-8
"""Prefill in bf16: rounded once more on the way, as libraries' attention rounds its weights, of the largest number."""


def checks(device: Device, settings: Settings) -> Iterator[Check]:
    """A check a case."""
    official = settings.official_sizes
    for case in step_cases(kernel_cases.OFFICIAL if official else kernel_cases.SMALL):
        yield Check(f"{case.op}: {case.name}", partial(_step, device, case), demand(STEP))
    yield from _of_prefill(device, official, libraries=False)
    if device.prefill_ops(libraries=True).forms != device.prefill_ops().forms:
        yield from _of_prefill(device, official, libraries=True)


def _of_prefill(device: Device, official: bool, *, libraries: bool) -> Iterator[Check]:
    name = "prefill by libraries" if libraries else "prefill"
    for packed in cases_of_prefill(prefill_cases.OFFICIAL if official else prefill_cases.SMALL):
        most = ROUNDED if "bfloat16" in packed.name else PREFILL
        yield Check(
            f"{name} {packed.op}: {packed.name}", partial(_prefill, device, packed, most, libraries), demand(most)
        )


def demand(most: float) -> str:
    return f"within {most:.2g} of the largest number, in bf16 {BF16_ULP:.2g} of each besides"


def _step(device: Device, case: StepCase) -> Outcome:
    kernel, twin = getattr(device.step_ops(), case.op), getattr(StepOps.torch(), case.op)
    return _told(case.compare(kernel, twin, device.device, STEP))


def _prefill(device: Device, case: PrefillCase, most: float, libraries: bool) -> Outcome:
    return _told(case.compare(device.prefill_ops(libraries=libraries), PrefillOps.torch(), device.device, most))


def _told(apart: float) -> Outcome:
    return Outcome(True, f"at most {apart:.2g} apart", {"apart": apart})
