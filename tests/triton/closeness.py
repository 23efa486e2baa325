"""When a kernel's numbers are its twin's: as the checks on a GPU have it."""

from __future__ import annotations

from hnet_runtime.gpu_doctor.closeness import BF16_ULP, FP32, close, noise

__all__ = ["BF16_ULP", "FP32", "close", "noise"]
