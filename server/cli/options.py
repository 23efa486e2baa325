"""Options that several commands share, and the rule for an environment variable's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


def option(name: str, *declarations: str, **attributes: Any) -> Callable[[_F], _F]:
    """An option with the environment variable of the same name: `--max-tokens` has `HNET_MAX_TOKENS`."""
    variable = "HNET_" + name.partition("/")[0].removeprefix("--").replace("-", "_").upper()
    attributes.setdefault("show_default", True)
    return click.option(name, *declarations, envvar=variable, show_envvar=True, **attributes)


def checkpoint_options(command: _F) -> _F:
    """--config and --revision: how to find a model."""
    command = option("--revision", help="Branch, tag or commit of a hub id.")(command)
    return option("--config", help="Configuration: a file, a directory with config.json, or an official name.")(command)


def engine_options(command: _F) -> _F:
    """How to find a model and how to run it: --config, --revision, --device, --dtype, --threads."""
    command = option("--threads", type=click.IntRange(1), help="CPU threads.")(command)
    command = option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        help="Arithmetic; auto is float32 for small models on a CPU, else bfloat16.",
    )(command)
    command = option("--device", default="auto", help="auto, cpu or cuda.")(command)
    return checkpoint_options(command)
