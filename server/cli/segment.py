"""`hnet segment`: where a model cuts a text into chunks, stage by stage."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from hnet_runtime.config import BOS
from hnet_runtime.engine.messages import Chunk, SamplingParams
from server.cli.loading import load_engine
from server.cli.options import engine_options, option
from server.cli.painter import ChunkPainter
from server.cli.streams import STANDARD_INPUT, harmless, read_bytes, wants_colour, write
from server.segmentation import segmentation


@click.command("segment")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [FILE or -]")
@engine_options
@option("--json", "as_json", is_flag=True, help="Print what POST /v1/segment answers.")
def segment(arguments: tuple[str, ...], *, as_json: bool, **engine: Any) -> None:
    """Show where MODEL cuts a text into chunks, once for every stage.

    The text is FILE, or standard input for `-` and for no FILE; it may be any bytes. One argument that is a
    file and not a weight file is the FILE, for HNET_MODEL or the demo model.
    """
    model, name = model_and_file(arguments)
    data = bytes([BOS]) + read_bytes(name)
    loaded = load_engine(model, max_model_len=len(data), **engine)
    params = SamplingParams(max_tokens=0, temperature=0.0, return_chunks=True, utf8="raw")
    (completion,) = loaded.generate([data], params)
    if completion.finish_reason == "error":
        raise click.ClickException(completion.error or "the engine gave up")
    num_stages = len(loaded.info.stages)
    if as_json:
        write(json.dumps(segmentation(loaded.info.model, completion.chunks, len(data), num_stages)) + "\n")
        return
    if num_stages == 1:
        raise click.ClickException(f"{loaded.info.model}: has a main network alone, which cuts nothing into chunks")
    write("\n".join(_shown(stage, completion.chunks, data) for stage in range(1, num_stages)))


def model_and_file(arguments: tuple[str, ...]) -> tuple[str | None, str]:
    """What `[MODEL] [FILE or -]` means, by the rule in the command's help."""
    from hnet_runtime.checkpoint.directory import WEIGHT_SUFFIXES
    from hnet_runtime.checkpoint.locate import is_model_name

    if len(arguments) > 2:
        raise click.UsageError(f"takes a MODEL and a FILE, not {len(arguments)} arguments")
    if len(arguments) == 2:
        return arguments
    default = os.environ.get("HNET_MODEL") or None
    if not arguments:
        return default, STANDARD_INPUT
    (argument,) = arguments
    is_text = os.path.isfile(argument) and not argument.endswith(WEIGHT_SUFFIXES)
    if is_text or not is_model_name(argument):
        return default, argument
    return argument, STANDARD_INPUT


def _shown(stage: int, chunks: tuple[Chunk, ...], data: bytes) -> str:
    """A heading, and the text with a mark or a change of colour where a chunk of this stage opens."""
    opened = [chunk for chunk in chunks if chunk.stage == stage]
    painter = ChunkPainter(colour=wants_colour(), clean=harmless)
    painter.opened(Chunk(1, chunk.start, chunk.p) for chunk in opened)  # one mark, whatever the stage
    painter.add(data)
    text = painter.finish()
    heading = f"stage {stage}: {len(opened)} chunks, {len(data) / max(len(opened), 1):.2f} bytes a chunk"
    return f"{heading}\n{text}" + ("" if text.endswith("\n") else "\n")
