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
    """checkpoint_options, and how to run a model: named as `Engine.from_pretrained` and `EngineConfig` name them."""
    command = option("--threads", type=click.IntRange(1), help="CPU threads.")(command)
    command = option(
        "--quantization",
        type=click.Choice(["int8"]),
        help="int8: 8-bit weights and activations in matrix products; needs native kernels.",
    )(command)
    command = option(
        "--kernels",
        type=click.Choice(["auto", "native", "torch", "triton", "libraries"]),
        default="auto",
        help="Code that runs the model; auto is native kernels on a CPU where they are built, Triton's on a GPU. "
        "libraries: Triton's, and for prompts causal-conv1d's and flash-attn's where they are installed.",
    )(command)
    command = option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        help="Weights' dtype; auto is float32 for small models on a CPU, else bfloat16.",
    )(command)
    command = option("--device", default="auto", help="auto, cpu or cuda.")(command)
    return checkpoint_options(command)


class Item(click.ParamType[str]):
    """One of several texts: the option is given for each, or they stand between commas in the environment."""

    name = "text"
    envvar_list_splitter = ","

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value).strip()


UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Bytes(click.ParamType[int]):
    """A number of bytes: `4194304`, `512M`, `1.5GiB`. Powers of 1024. With `can_be_off` also `off`, which is 0."""

    name = "bytes"

    def __init__(self, *, can_be_off: bool = False) -> None:
        self._can_be_off = can_be_off

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower()
        if self._can_be_off and text in ("off", "0"):
            return 0
        text = text.removesuffix("ib").removesuffix("b")
        number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS and text[-1:] else (text, "")
        try:
            size = int(float(number) * UNITS[unit])
        except (ValueError, OverflowError):
            off = ", nor off" if self._can_be_off else ""
            self.fail(f"{value!r} is not a number of bytes such as 4194304, 512M or 2G{off}", param, ctx)
        if size < 1:
            self.fail(f"{value!r} must be at least 1 byte", param, ctx)
        return size
