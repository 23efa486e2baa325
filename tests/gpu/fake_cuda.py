"""CUDA tensors without memory: torch's fake tensors, on a build that knows no CUDA.

Under them whatever would wait for the device (`.item()`, `bool()`, a shape that depends on data) raises by itself.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

SOURCE = Path(__file__).with_suffix(".cpp")


@cache
def _register_guard(folder: Path) -> None:
    """Indexing, modules and much else ask for a guard of the tensors' device; once a process."""
    if torch.cuda.is_available():
        return
    package = Path(torch.__file__).parent
    library = folder / "fake_cuda.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{package / 'include'}", str(SOURCE)]
    command += ["-o", str(library), f"-L{package / 'lib'}", "-lc10", f"-Wl,-rpath,{package / 'lib'}"]
    subprocess.run(command, check=True, timeout=120)
    ctypes.CDLL(str(library)).register_cuda_guard()


def fake_cuda(folder: Path) -> FakeTensorMode:
    """A mode in which tensors made on `cuda` are fake; `folder` is where the guard is compiled to."""
    _register_guard(folder)
    return FakeTensorMode()
