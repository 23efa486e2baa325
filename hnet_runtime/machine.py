"""What this machine is: processor, memory, GPU, and which optional packages import.

Knows nothing of models. Every finding is a plain value; nothing here changes a setting.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path

import torch

# Instruction sets that matrix products and half precision live on, as Linux names them.
_INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "avx_vnni", "asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm"),
)
# Distribution → module, of the `cuda` extra.
_GPU_PACKAGES = {
    "triton": "triton",
    "mamba-ssm": "mamba_ssm",
    "flash-attn": "flash_attn",
    "causal-conv1d": "causal_conv1d",
}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; `memory` in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """`memory` in bytes; `cores` are those this process may use; `packages` says of each whether it imports."""

    system: str
    python: str
    torch: str
    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    memory: int | None
    cuda: str | None  # the CUDA version PyTorch was built for
    gpus: tuple[Gpu, ...]
    packages: dict[str, str]


def inspect_machine() -> Machine:
    """Looks at the machine this process runs on."""
    cpu, flags = _processor()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        cpu=cpu,
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        cuda=torch.version.cuda,
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        packages={name: _import_state(name, module) for name, module in _GPU_PACKAGES.items()},
    )


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and its feature flags, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        name.group(1).strip() if name else platform.processor() or platform.machine(),
        frozenset(flags.group(1).split()) if flags else frozenset(),
    )


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory)


def _import_state(name: str, module: str) -> str:
    """The version of a package that imports, or why it does not."""
    if util.find_spec(module) is None:
        return "not installed"
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not import: {' '.join(str(error).split())}"
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "imports"
