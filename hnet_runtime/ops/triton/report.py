"""What the compiler says of every kernel, as a table: `python -m hnet_runtime.ops.triton.report docs/kernels.md`.

Compiles all kernels for all architectures (minutes the first time; Triton keeps what it compiled) and writes the table
into the document, between its two markers; without a document it prints it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch
import triton
from torch import Tensor

from hnet_runtime.ops.triton.compiling import ARCHITECTURES, Compiled, compile_for
from hnet_runtime.ops.triton.launching import Launch
from hnet_runtime.ops.triton.registry import every_launch

BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"

_HEAD = (
    "kernel",
    "model",
    "constants",
    "warps",
    "registers " + " / ".join(f"sm_{each}" for each in ARCHITECTURES),
    "spilled bytes",
    "stack bytes",
    "shared bytes",
    "loads of 128 / 64 / fewer bits",
    "stores of 128 / 64 / fewer bits",
)


def model_dtype(launch: Launch) -> str:
    """bf16 if the kernel is handed bf16, else fp32."""
    dtypes = {value.dtype for value in launch.arguments.values() if isinstance(value, Tensor)}
    return "bf16" if torch.bfloat16 in dtypes or launch.constants.get("IN_BF16") else "fp32"


def table(compiled: Iterable[Compiled]) -> str:
    """A row for each kernel and dtype: the worst of its numbers, and all values of a model's constants that differ."""

    def group_of(each: Compiled) -> tuple[str, str]:
        return each.launch.name, model_dtype(each.launch)

    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for (name, dtype), found in groupby(sorted(compiled, key=group_of), key=group_of):
        group = list(found)
        registers = [max(each.registers for each in group if each.architecture == a) for a in ARCHITECTURES]
        cells = (
            f"`{name}`",
            dtype,
            _differing([each.launch for each in group]),
            _range(each.launch.options["num_warps"] for each in group),
            " / ".join(map(str, registers)),
            str(max(each.spill_bytes for each in group)),
            str(max(each.stack_bytes for each in group)),
            str(max(each.shared_bytes for each in group)),
            _widths([each.loads for each in group]),
            _widths([each.stores for each in group]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differing(launches: Sequence[Launch]) -> str:
    names = [
        name for name in launches[0].constants if not name.startswith("BLOCK") and name != "SCALE"
    ]  # follow others
    values = {name: sorted({each.constants[name] for each in launches}) for name in names}
    return ", ".join(f"{name} {'·'.join(map(str, found))}" for name, found in values.items() if len(found) > 1)


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return "·".join(map(str, found))


def _widths(accesses: Sequence[Counter[int]]) -> str:
    """The most instructions of each width that one of the kernels has."""

    def most(low: int, high: int) -> int:
        return max(sum(count for bits, count in each.items() if low <= bits <= high) for each in accesses)

    return f"{most(128, 256)} / {most(64, 64)} / {most(0, 32)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", nargs="?", type=Path)
    document: Path | None = parser.parse_args().document
    launches = every_launch()
    compiled = []
    for done, launch in enumerate(launches):
        print(f"{done + 1} of {len(launches)}: {launch.name}", file=sys.stderr)
        compiled += [compile_for(launch, architecture) for architecture in ARCHITECTURES]
    said = (
        f"{len(launches)} kernels with their constants, each for {len(ARCHITECTURES)} architectures, "
        f"by Triton {triton.__version__}:\n\n{table(compiled)}"
    )
    if document is None:
        print(said)
        return
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{document}: no markers {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n{said}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
