"""What the device is, what runs prefill on it, and how fast its memory is."""

from __future__ import annotations

from collections.abc import Iterator

from hnet_runtime.gpu_doctor.checks import Check, Outcome, Settings
from hnet_runtime.gpu_doctor.device import Device


def checks(device: Device, settings: Settings) -> Iterator[Check]:
    """Nothing here is right or wrong: it fails where it cannot be told."""
    del settings

    def describe() -> Outcome:
        found = device.describe()
        told = (f"{name} {value}" for name, value in found.items() if isinstance(value, str | int | float))
        return Outcome(True, ", ".join(told), found)

    def bandwidth() -> Outcome:
        measured = device.copy_bandwidth()
        return Outcome(True, f"{measured / 1e9:.1f} GB/s read and written by a copy", {"bytes_per_second": measured})

    yield Check("what it is", describe)
    yield Check("memory bandwidth", bandwidth)
