"""Kernels compiled ahead of time for GPUs that are not here, and what the compiler says of the machine code.

Needs no GPU: Triton brings NVIDIA's assembler along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hnet_runtime.ops.triton.launching import Launch

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200

_ACCESS = re.compile(r"\b(ld|st)\.global((?:\.[A-Za-z_0-9:]+)*?)(?:\.v([248]))?\.[bfus](\d+)\b")
_COPIES = re.compile(r"\bcp\.async(?:\.\w+)*\.shared\.global(?:\.\w+)* \[[^\]]*\], \[[^\]]*\], (?:0x)?(\d+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    registers: of a thread; spill_bytes: of a thread, stored and loaded; stack_bytes: of a thread, spills or a
    function's own array; shared_bytes: of a program. loads, stores: instructions that reach global memory, by the bits
    that a thread moves with one. barriers: at which the warps of a program wait for each other.
    """

    launch: Launch
    architecture: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    loads: Counter[int]
    stores: Counter[int]
    barriers: int


def compile_for(launch: Launch, architecture: int) -> Compiled:
    """Compiles what was launched, or takes it from Triton's cache. Raises what Triton raises where it cannot be."""
    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.types,
        constexprs={(names.index(name),): value for name, value in launch.fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    ptx = kernel.asm["ptx"]
    said = _assembled(ptx, architecture)
    stack, stored, loaded = map(int, _found(_SPILLS, said).groups())
    accesses = {"ld": Counter[int](), "st": Counter[int]()}
    for kind, _, vector, bits in _ACCESS.findall(ptx):
        accesses[kind][int(vector or 1) * int(bits)] += 1
    for size in _COPIES.findall(ptx):
        accesses["ld"][8 * int(size, 16)] += 1
    return Compiled(
        launch,
        architecture,
        registers=int(_found(_REGISTERS, said)[1]),
        spill_bytes=stored + loaded,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        loads=accesses["ld"],
        stores=accesses["st"],
        barriers=ptx.count("bar.sync"),
    )


def _assembled(ptx: str, architecture: int) -> str:
    """What the assembler says of registers and spills."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = tools / "ptxas-blackwell"
    assembler = newer if architecture >= 100 and newer.exists() else tools / "ptxas"
    target = _found(re.compile(r"\.target (\w+)"), ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        result = subprocess.run(
            [assembler, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    return result.stderr


def _found(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    match = pattern.search(text)
    assert match is not None, f"{pattern.pattern} is not in: {text[:500]}"
    return match
