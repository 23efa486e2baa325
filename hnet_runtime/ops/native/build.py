"""Compiles the native kernels: one plain shared library for each instruction set, in `lib/` beside their sources.

Knows compilers and files; does not know what the kernels compute, nor how they are called. It imports nothing of the
package and nothing beyond the standard library: setup.py loads this file by itself, before anything is installed.
By hand: `python -m hnet_runtime.ops.native.build`, or `make native`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARIES = SOURCES / "lib"
COMPILERS = ("g++", "clang++", "c++")

# No flag here may let the compiler change the order of a sum: numbers must not depend on how a loop was vectorised.
_COMMON = (
    *("-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-shared", "-fPIC", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_FAST = ("-O3",)
_SANITIZED = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


@dataclass(frozen=True)
class Isa:
    """An instruction set that a library is compiled for.

    compiler_flags: what the compiler is told.
    cpu_flags: what the processor must have, by Linux' names in /proc/cpuinfo.
    """

    name: str
    compiler_flags: tuple[str, ...] = ()
    cpu_flags: frozenset[str] = frozenset()

    @property
    def file_name(self) -> str:
        return f"libhnet_{self.name}.so"


_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512 = Isa("avx512", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"})
PORTABLE = Isa("portable")
ISAS = (  # best first
    Isa(
        "amx",
        (*_AVX512.compiler_flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        _AVX512.cpu_flags | {"amx_tile", "amx_bf16", "amx_int8"},
    ),
    _AVX512,
    Isa("avx2", ("-march=x86-64-v3",), _V3),
    PORTABLE,
)


def isas_of(machine: str) -> tuple[Isa, ...]:
    """The instruction sets that are built for a processor of that family (`platform.machine()`), best first."""
    return ISAS if machine.lower() in ("x86_64", "amd64") else (PORTABLE,)


@dataclass(frozen=True)
class Compiler:
    """command: the words of its call; version: the first line of what it says of itself."""

    command: tuple[str, ...]
    version: str


class NoCompiler(RuntimeError):
    """No C++ compiler to build with; the message says what was looked for."""


def find_compiler(environ: Mapping[str, str] = os.environ) -> Compiler:
    """What CXX names, or else the first of g++, clang++ and c++; raises NoCompiler."""
    wanted = shlex.split(environ.get("CXX", ""))
    candidates = [wanted] if wanted else [[name] for name in COMPILERS]
    for command in candidates:
        if not shutil.which(command[0], path=environ.get("PATH")):
            continue
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        if said.returncode == 0 and said.stdout:
            return Compiler(tuple(command), said.stdout.splitlines()[0])
    raise NoCompiler(
        f"CXX={environ['CXX']} is no C++ compiler" if wanted else f"no C++ compiler ({', '.join(COMPILERS)}) is found"
    )


@dataclass(frozen=True)
class Built:
    """What `build` did: names of instruction sets compiled now and found up to date, and why the others failed.

    note: the compiler, or why there is none.
    """

    compiled: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def complete(self) -> bool:
        return bool(self.compiled or self.kept) and not self.failed

    def __str__(self) -> str:
        parts = [
            f"compiled {', '.join(self.compiled)}" if self.compiled else "",
            f"up to date {', '.join(self.kept)}" if self.kept else "",
            *(f"{name} failed: {reason}" for name, reason in self.failed.items()),
            self.note,
            "" if self.compiled or self.kept else "none is built, so the slower torch path will serve",
        ]
        return f"native kernels: {'; '.join(part for part in parts if part)}"


def flags(isa: Isa, *, sanitized: bool = False) -> tuple[str, ...]:
    """What a compiler is told, apart from files."""
    return (*_COMMON, *(_SANITIZED if sanitized else _FAST), *isa.compiler_flags)


def source_files(sources: Path = SOURCES) -> list[Path]:
    return sorted([*sources.glob("*.cpp"), *sources.glob("*.h")])


def _fingerprint(isa: Isa, sources: Path, sanitized: bool) -> str:
    """Changes with the sources and the flags of a library."""
    digest = hashlib.sha256(" ".join(flags(isa, sanitized=sanitized)).encode())
    for path in source_files(sources):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _stamp(library: Path) -> Path:
    """The file beside a library that says what it was made from: a fingerprint, and on a second line by whom."""
    return library.with_suffix(".stamp")


def _read_stamp(library: Path) -> list[str]:
    stamp = _stamp(library)
    return stamp.read_text(encoding="utf-8").splitlines() if library.exists() and stamp.exists() else []


def is_current(isa: Isa, library: Path, sources: Path = SOURCES) -> bool:
    """Whether the library was made from the sources as they are now."""
    return _read_stamp(library)[:1] == [_fingerprint(isa, sources, sanitized=False)]


def compile_library(compiler: Compiler, isa: Isa, library: Path, sources: Path, sanitized: bool) -> str:
    """Compiles one library; returns the compiler's first complaint, or nothing where it succeeded.

    The library comes to its place in one move: a process that has the old one mapped keeps it.
    """
    fingerprint = _fingerprint(isa, sources, sanitized)
    fresh = library.with_suffix(f".{os.getpid()}.so")
    command = [*compiler.command, *flags(isa, sanitized=sanitized), str(sources / "interface.cpp"), "-o", str(fresh)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return next((line for line in lines if "error" in line), lines[0] if lines else f"exit {done.returncode}")
        fresh.replace(library)
    finally:
        fresh.unlink(missing_ok=True)
    fresh_stamp = _stamp(library).with_suffix(f".{os.getpid()}.stamp")
    fresh_stamp.write_text(f"{fingerprint}\n{compiler.version}\n", encoding="utf-8")
    fresh_stamp.replace(_stamp(library))
    return ""


def build(
    folder: Path = LIBRARIES,
    *,
    sources: Path = SOURCES,
    sanitized: bool = False,
    environ: Mapping[str, str] = os.environ,
    machine: str = "",
) -> Built:
    """Makes the libraries of this machine's family in `folder`, all at once, where they are missing or out of date.

    Never raises for a compiler that is missing or fails: the package is complete without native kernels.
    """
    try:
        compiler = find_compiler(environ)
    except NoCompiler as error:
        return Built(note=str(error))
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Isa] = []
    due: list[Isa] = []
    for isa in isas_of(machine or platform.machine()):
        wanted = [_fingerprint(isa, sources, sanitized), compiler.version]
        (kept if _read_stamp(folder / isa.file_name) == wanted else due).append(isa)
    with ThreadPoolExecutor(max_workers=len(ISAS)) as pool:
        complaints = list(
            pool.map(lambda isa: compile_library(compiler, isa, folder / isa.file_name, sources, sanitized), due)
        )
    failed = {isa.name: complaint for isa, complaint in zip(due, complaints, strict=True) if complaint}
    compiled = tuple(isa.name for isa in due if isa.name not in failed)
    return Built(compiled, tuple(isa.name for isa in kept), failed, f"by {compiler.version}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the native kernels where they are missing or out of date.")
    parser.add_argument("--into", type=Path, default=LIBRARIES, help="folder of the libraries (the package's own)")
    parser.add_argument("--optional", action="store_true", help="succeed where there is no compiler or it fails, too")
    arguments = parser.parse_args()
    try:
        built = build(arguments.into)
    except OSError as error:
        print(f"native kernels: {error}", file=sys.stderr)
        return 1
    print(built)
    return 0 if arguments.optional or built.complete else 1


if __name__ == "__main__":
    sys.exit(main())
