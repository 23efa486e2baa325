"""What the checks need of a GPU: operations, captures, clocks, and what it is. A CPU can stand in for all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

from hnet_runtime.engine.graphs import Captures, CudaGraphs
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.prefill import PrefillOps

CUDA = "hnet_runtime.gpu_doctor.device:CudaDevice"
_COPIED_BYTES, _COPIES = 1 << 30, 10


class Device(Protocol):
    """Made without arguments, by its name, in the process that runs a group."""

    device: torch.device

    def missing(self) -> str:
        """Why there is nothing to check, in one line; empty where there is."""

    def describe(self) -> dict[str, Any]:
        """What it is, by plain names: numbers, texts, and lists or mappings of them."""

    def step_ops(self) -> StepOps:
        """The operations of a step that serve; ImportError where they are not there."""

    def prefill_ops(self, *, libraries: bool = False) -> PrefillOps:
        """The operations of prefill that serve, or those that do with libraries' kernels among them; ImportError where
        they are not there."""

    def captures(self) -> Captures:
        """What captures steps."""

    def synchronize(self) -> None:
        """Waits for all that was asked of it. Raises where something of that has failed."""

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy much larger than caches."""


class CudaDevice:
    """The first CUDA device that this process sees."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")

    def missing(self) -> str:
        """See Device."""
        if torch.version.cuda is None:
            return f"no CUDA device: PyTorch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device is visible to PyTorch (nvidia-smi shows what the driver sees; CUDA_VISIBLE_DEVICES)"
        return ""

    def describe(self) -> dict[str, Any]:
        """See Device."""
        from hnet_runtime.machine import inspect_machine
        from hnet_runtime.ops.triton.libraries import choose

        machine = inspect_machine()
        properties = torch.cuda.get_device_properties(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": total,
            "free_bytes": free,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "torch": machine.torch,
            "python": machine.python,
            "system": machine.system,
            "packages": machine.packages,
            "prefill": {op: _told(choice) for op, choice in choose(self.device, libraries=False).items()},
            "prefill with libraries": {op: _told(choice) for op, choice in choose(self.device).items()},
        }

    def step_ops(self) -> StepOps:
        """See Device."""
        return StepOps.triton()

    def prefill_ops(self, *, libraries: bool = False) -> PrefillOps:
        """See Device."""
        from hnet_runtime.ops.triton.adapters import prefill_ops
        from hnet_runtime.ops.triton.libraries import choose

        return prefill_ops(choose(self.device, libraries=libraries))

    def captures(self) -> Captures:
        """See Device."""
        return CudaGraphs(self.device)

    def synchronize(self) -> None:
        """See Device."""
        torch.cuda.synchronize(self.device)

    def copy_bandwidth(self) -> float:
        """See Device."""
        size = min(_COPIED_BYTES, torch.cuda.mem_get_info(self.device)[0] // 4)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        best = min(timed(self, lambda: target.copy_(source)) for _ in range(_COPIES))
        return 2 * size / best


def open_device(name: str) -> Device:
    """The device of `module:class`."""
    module, _, kind = name.partition(":")
    device: Device = getattr(import_module(module), kind)()
    return device


def timed(device: Device, run: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    device.synchronize()
    began = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - began


def _driver() -> str:
    """The driver's version, where the driver's own library tells it."""
    import ctypes

    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        library.nvmlInit_v2()
        failed = library.nvmlSystemGetDriverVersion(text, len(text))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return "unknown"
    return "unknown" if failed else text.value.decode()


def _told(choice: Any) -> str:
    text = str(choice.name)
    if choice.where:
        text += f" for {choice.where}, else {choice.otherwise}"
    declined = "; ".join(f"not {name}: {reason}" for name, reason in choice.declined.items())
    return f"{text} ({declined})" if declined else text
