"""Runs the kernels' tests on libraries built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

For each instruction set that this processor runs: a process with the sanitizer's runtime loaded first, in which every
allocation, torch's tensors too, is fenced. The first error ends it. First of all an overrun made on purpose must be
caught, so that a green run means something. Where there is no such runtime it says so and succeeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hnet_runtime.ops.native import build, library

ROOT = Path(__file__).parents[2]
LIBRARIES = ROOT / "build" / "sanitize"
NOT_KERNELS = ("test_build.py", "test_library.py")  # they test files and processors, and start compilers

# A product that reads 15 of 16 activations: one float before the fence.
OVERRUN = """
import ctypes
from hnet_runtime.ops.native import binding
from hnet_runtime.ops.native.library import open_library
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
weights, y = (ctypes.c_float * (16 * 16))(), (ctypes.c_float * 16)()
matrix = binding.Matrix(kind=binding.FLOAT32, n=16, k=16, data=ctypes.addressof(weights))
open_library().calls.hnet_product(matrix, malloc(15 * 4), 16, 1, ctypes.addressof(y), 16, 0, 1)
"""


def runtime_of(compiler: build.Compiler) -> Path | None:
    """The sanitizer's library that must be loaded before all others; None where the compiler has none."""
    asked = subprocess.run(
        [*compiler.command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    path = Path(asked.stdout.strip())
    return path if asked.returncode == 0 and path.is_absolute() and path.exists() else None


def environment(runtime: Path, path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave memory to the end of the process
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that Python's own objects are fenced
        "OMP_NUM_THREADS": "1",
        "HNET_NATIVE": "auto",
        library.OVERRIDE: str(path),
    }


def main() -> int:
    try:
        compiler = build.find_compiler()
    except build.NoCompiler as error:
        print(f"sanitizers: skipped: {error}")
        return 0
    runtime = runtime_of(compiler)
    if runtime is None:
        print(f"sanitizers: skipped: {compiler.command[0]} has no libasan.so ({compiler.version})")
        return 0
    built = build.build(LIBRARIES, sanitized=True)
    print(built, flush=True)
    if built.failed:
        return 1
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--capture=sys", "-p", "no:cacheprovider"]
    tests += ["tests/native", *(f"--ignore=tests/native/{name}" for name in NOT_KERNELS)]
    for isa in (*built.compiled, *built.kept):
        os.environ[library.OVERRIDE] = str(LIBRARIES / f"libhnet_{isa}.so")
        chosen = library.available()[0]
        if not chosen.runnable:
            print(f"sanitizers: {isa}: skipped: {chosen.reason}", flush=True)
            continue
        print(f"sanitizers: {isa}", flush=True)
        fenced = environment(runtime, LIBRARIES / f"libhnet_{isa}.so")
        overrun = subprocess.run([sys.executable, "-c", OVERRUN], cwd=ROOT, env=fenced, capture_output=True, text=True)
        if "heap-buffer-overflow" not in overrun.stderr:
            print(f"sanitizers: {isa}: an overrun made on purpose was not caught: {overrun.stderr[-2000:]}")
            return 1
        if subprocess.run(tests, cwd=ROOT, env=fenced, check=False).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
