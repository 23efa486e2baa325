"""Read bandwidth of this process, the roof over everything that reads weights.

Measured by a loop of our own that only reads (read_words.cpp, compiled on first use) and by torch's sum: the larger
counts, so that a share of the roofline is not flattered. Without a compiler there is torch's sum alone.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hnet_runtime.ops.native.build import NoCompiler, find_compiler


class Buffer:
    """Memory to read, `num_bytes` of it and at least 64 MiB, kept between measurements."""

    def __init__(self, num_bytes: int) -> None:
        self._words = torch.ones(max(num_bytes, 64 << 20) // 4 + 16, dtype=torch.float32)

    def bandwidth(self, threads: int, rounds: int = 5) -> float:
        """Bytes a second by so many threads, the best of `rounds`."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        words, loop, best = self._words, _read_loop(), 0.0
        for _ in range(rounds):
            started = time.perf_counter()
            words.sum()
            best = max(best, words.nbytes / (time.perf_counter() - started))
            if loop is not None:
                address = -(-words.data_ptr() // 64) * 64
                started = time.perf_counter()
                loop(address, words.nbytes - 64, threads)
                best = max(best, words.nbytes / (time.perf_counter() - started))
        torch.set_num_threads(before)
        return best


def read_bandwidth(num_bytes: int, threads: int) -> float:
    """Bytes a second read from a buffer of that size by so many threads: the best of five."""
    return Buffer(num_bytes).bandwidth(threads)


@cache
def _read_loop() -> Any:
    """The compiled loop, None where it cannot be compiled."""
    source = Path(__file__).with_name("read_words.cpp")
    folder = tempfile.TemporaryDirectory(prefix="hnet-bandwidth-")
    library = Path(folder.name) / "read_words.so"
    try:
        command = [*find_compiler().command, "-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, "-Wno-psabi", str(source), "-o", str(library)], check=True, capture_output=True)
    except (NoCompiler, subprocess.CalledProcessError):
        return None
    loop = ctypes.CDLL(str(library)).read_words
    folder.cleanup()  # what is mapped stays
    loop.restype, loop.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return loop
