"""`hnet bench`: the benchmarks of a checkout, by name. Knows where they are, and nothing of what they measure."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

BENCHMARKS = (
    "roofline",
    "decode",
    "batching",
    "beside",
    "http",
    "prefill",
    "prefix",
    "peers",
    "clients",
    "acceptance",
    "cluster",
    "gpu-model",
    "precision",
    "serve",
    "start",
    "structured",
)
_MODULES = {  # the others are in the file of their name
    "prefix": "benchmarks.prefix_cache",
    "gpu-model": "benchmarks.gpu_model",
    "http": "benchmarks.http_overhead",
    "serve": "loadtests.__main__",
}
CHECKOUT = Path(__file__).resolve().parents[2]


@click.command(
    "bench",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
)
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> int:
    """Run a benchmark from a checkout, each with its own --help.

    --json FILE writes the figures, in the form that docs/performance.md states.
    """
    if not (CHECKOUT / "benchmarks" / "__init__.py").exists():
        raise click.ClickException("benchmarks are part of a checkout, not of the installed package")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    import_module(_MODULES.get(name, f"benchmarks.{name}")).main(list(arguments))
    return 0
