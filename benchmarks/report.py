"""A benchmark's result as rows: printed as a table, written as JSON in the form docs/api.md states."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One figure; `ratio` is value ÷ the value of the row named `ratio_to`, of the same run."""

    name: str
    value: float
    unit: str
    ratio_to: str | None = None
    ratio: float | None = None


def machine() -> dict[str, str | int]:
    """The machine in words: processor, cores, memory, versions."""
    model = platform.processor() or platform.machine()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
            elif line.startswith("flags"):
                flags = line
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "processor": model,
        "isa": " ".join(flag for flag in wanted if f" {flag} " in f"{flags} "),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit measured, or "unknown" outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def write_json(path: Path, benchmark: str, rows: list[Row]) -> None:
    document = {
        "benchmark": benchmark,
        "commit": commit(),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measured(command: str) -> str:
    """A sentence for a page: when, by what and where it was measured."""
    words = machine()
    return (
        f"Measured {date.today().isoformat()} at commit {commit()} by `{command}` on {words['processor']}, "
        f"{words['cores']} cores, {words['isa']}, {words['memory_gib']} GiB."
    )


def rows_in_markdown(rows: list[Row]) -> list[str]:
    """A table of the rows: counts (int) as they are, what was measured (float) to three digits."""
    lines = ["| what | figure | unit | ratio to | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        value = f"{row.value:d}" if isinstance(row.value, int) else f"{row.value:.3g}"
        lines.append(f"| {row.name} | {value} | {row.unit} | {row.ratio_to or ''} | {ratio} |")
    return lines


def write_part(path: Path, title: str, lines: list[str]) -> None:
    """Writes what stands under a title of the first level, and leaves the page's other parts as they are."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = [part.rstrip() for part in re.split(r"(?m)^(?=# )", page) if part.strip()]
    fresh = "\n".join([f"# {title}", "", *lines])
    at = next((index for index, part in enumerate(parts) if part.split("\n", 1)[0] == f"# {title}"), len(parts))
    parts[at : at + 1] = [fresh]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def print_table(title: str, columns: list[str], lines: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=120).print(table)


def numbers(listed: str) -> list[int]:
    """`1,4,16` → [1, 4, 16]."""
    return [int(part) for part in listed.split(",")]


def options_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark: the models, how they run, and where figures go."""
    parser = argparse.ArgumentParser(description=(docstring or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="demo, random:NAME or a directory; may be given again")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "native", "torch"])
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--bytes-per-chunk", type=float, help="draw boundaries at this mean instead of the router's")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def finish(benchmark: str, rows: list[Row], path: Path | None) -> None:
    """Says where the figures come from, and writes them where asked."""
    words = machine()
    said = f"{words['processor']}, {words['cores']} cores, {words['isa']}, {words['memory_gib']} GiB"
    Console(width=120).print(f"{said}; torch {words['torch']}; commit {commit()}", highlight=False)
    if path is not None:
        write_json(path, benchmark, rows)
