"""The scan of training as a native kernel, compiled for this machine where it has a compiler.

Knows scan.cpp's signatures and where its library is kept; who has no compiler trains with the form in plain torch
(`parallel_ops.blocked_scan`), which is several times slower. Unlike the kernels that serve, it is free to sum as is
fastest: a run's curve is exact on the machine and with the library that it was begun with.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnet_runtime.ops.native.build import NoCompiler, find_compiler

HEAD_DIM = 64
_BLOCK = 32  # scan.cpp's
_SOURCE = Path(__file__).with_name("scan.cpp")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC")
_log = logging.getLogger(__name__)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_t = S_t C_t of Mamba-2's recurrence, without its skip. x: [T, R, H, 64], dt: [T, R, H], a: [H], b, c: [T, R,
    N], all fp32 → [T, R, H, 64]. Only where `is_available`."""
    y: Tensor = _Scan.apply(x, dt, a, b, c)  # type: ignore[no-untyped-call]
    return y


def is_available() -> bool:
    """Whether the kernel can be used here; why not is logged once."""
    return _library() is not None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(each.contiguous() for each in inputs)
        x, states = inputs[0], inputs[3].shape[-1]
        times, rows, heads, _ = x.shape
        y = torch.empty_like(x)
        kept = x.new_empty(rows, heads, -(-times // _BLOCK), states, HEAD_DIM)
        _call("scan_forward", (times, rows, heads, states), (*inputs, y, kept))
        context.save_for_backward(*inputs, kept)
        return y

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, ...]:
        x, dt, a, b, c, kept = context.saved_tensors
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        da, db, dc = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(c)
        shape = (*x.shape[:3], b.shape[-1])
        _call("scan_backward", shape, (x, dt, a, b, c, kept, gradients[0].contiguous(), dx, ddt, da, db, dc))
        return dx, ddt, da, db, dc


def _call(name: str, shape: tuple[int, ...], tensors: tuple[Tensor, ...]) -> None:
    library = _library()
    assert library is not None
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in tensors]
    getattr(library, name)(*map(ctypes.c_ssize_t, shape), *pointers)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built()))
    except (NoCompiler, OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        _log.warning("training without its native scan, several times slower: %s", said)
        return None


def _built() -> Path:
    """The library for this machine, compiled the first time; it is named after all that it depends on."""
    compiler = find_compiler()
    told = (*compiler.command, compiler.version, *_FLAGS, _processor())
    name = hashlib.sha256("\0".join(told).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hnet-serve" / "training"
    library = folder / f"scan-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            command = [*compiler.command, *_FLAGS, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(library)
    return library


def _processor() -> str:
    """What -march=native sees: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.machine())
