"""Runs the kernels' tests on libraries built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

For each instruction set that this processor runs: a process with the sanitizer's runtime loaded first, in which every
allocation, torch's tensors too, is fenced. The first error ends it. First of all an overrun made on purpose must be
caught, so that a green run means something. Where there is no such runtime it says so and succeeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hnet_runtime.ops.native import build, library

ROOT = Path(__file__).parents[2]
LIBRARIES = ROOT / "build" / "sanitize"
NOT_KERNELS = ("test_build.py", "test_library.py")  # they test files and processors, and start compilers
# Many forwards, of kinds that the other tests run too: on the best library only.
ONCE = ("test_native_exactness.py", "test_native_quantization.py")

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


def runtime_of(compiler: build.Compiler) -> tuple[Path, ...] | None:
    """What must be loaded before all else; None where the compiler has no sanitizer.

    The C++ library stands behind the sanitizer's: looked for at start, it would not be found in Python, and the first
    exception that torch throws would be one that the sanitizer cannot pass on.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*compiler.command, f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
        if not path.is_absolute() or not path.exists():
            return None
        found.append(path)
    return tuple(found)


def environment(runtime: tuple[Path, ...], path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, runtime)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave memory to the end of the process
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that Python's own objects are fenced
        "OMP_NUM_THREADS": "1",
        "HNET_NATIVE": "auto",
        library.OVERRIDE: str(path),
    }


def watch(isa: str, left_out: tuple[str, ...], runtime: tuple[Path, ...]) -> tuple[bool, str]:
    """Whether all went well on one instruction set's library, and what was said."""
    fenced = environment(runtime, LIBRARIES / f"libhnet_{isa}.so")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=fenced,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    overrun = run("-c", OVERRUN).stdout
    if library.REFUSED in overrun:
        return True, f"skipped: {library.REFUSED}\n"
    if "heap-buffer-overflow" not in overrun:
        return False, f"an overrun made on purpose was not caught: {overrun[-2000:]}"
    options = ["-q", "-m", "not slow", "--timeout=600", "--capture=sys", "-p", "no:cacheprovider"]
    tests = run("-m", "pytest", *options, "tests/native", *(f"--ignore=tests/native/{name}" for name in left_out))
    return tests.returncode == 0, tests.stdout


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
    if not built.complete:
        return 1
    runnable = []
    for isa in (isa.name for isa in build.ISAS if isa.name in (*built.compiled, *built.kept)):
        os.environ[library.OVERRIDE] = str(LIBRARIES / f"libhnet_{isa}.so")
        # By files and processor alone: loaded here, without its runtime in front, it would end this process.
        known = library.candidates()[0]
        if known.runnable:
            runnable.append(isa)
        else:
            print(f"sanitizers: {isa}: skipped: {known.reason}", flush=True)
    all_well = True
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = [
            pool.submit(watch, isa, NOT_KERNELS if isa is runnable[0] else (*NOT_KERNELS, *ONCE), runtime)
            for isa in runnable
        ]
        for isa, future in zip(runnable, futures, strict=True):
            well, said = future.result()
            print(f"sanitizers: {isa}: {'well' if well else 'FAILED'}\n{said}", flush=True)
            all_well = all_well and well
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
