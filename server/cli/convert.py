"""`hnet convert`: any checkpoint as safetensors and `config.json`."""

from __future__ import annotations

from typing import Literal

import click

from server.cli.loading import progress_bar
from server.cli.options import checkpoint_options, option
from server.cli.streams import write


@click.command("convert")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@checkpoint_options
@option(
    "--dtype",
    type=click.Choice(["stored", "float32", "bfloat16"]),
    default="stored",
    help="stored keeps every tensor as it is; what must stay float32 always does.",
)
@option("--force", is_flag=True, help="Write into a directory that is not empty.")
def convert(
    source: str,
    destination: str,
    *,
    config: str | None,
    revision: str | None,
    dtype: Literal["stored", "float32", "bfloat16"],
    force: bool,
) -> None:
    """Write the model SRC as config.json and model.safetensors into the directory DST.

    SRC is any MODEL: an official .pt (with --config, or config.json beside it), a directory, a hub id, random:NAME.
    """
    from hnet_runtime import checkpoint

    located = checkpoint.locate(source, config, revision)
    with progress_bar(f"writing {destination}") as progress:
        written = checkpoint.convert(
            located, destination, None if dtype == "stored" else dtype, force=force, progress=progress
        )
    size = sum(path.stat().st_size for path in (written / "config.json", written / "model.safetensors"))
    write(f"{written}: config.json and model.safetensors, {size / 2**20:.1f} MiB\n")
