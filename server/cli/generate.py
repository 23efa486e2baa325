"""`hnet generate`: a completion, streamed to the terminal as it comes."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import click

from hnet_runtime.config import BOS
from hnet_runtime.engine.messages import Output, SamplingParams
from server.cli.loading import DEFAULT_MODEL_LEN, load_engine
from server.cli.options import engine_options, option
from server.cli.painter import ChunkPainter
from server.cli.streams import harmless, read_bytes, wants_colour, write
from server.text import TextDecoder, incomplete_tail


@click.command("generate")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [PROMPT]")
@engine_options
@option("--max-tokens", type=click.IntRange(1), default=256, help="Bytes to write at most.")
@option("--temperature", type=click.FloatRange(0), default=0.7, help="0 always takes the most probable byte.")
@option("--top-k", type=click.IntRange(0), default=0, help="Choose among the K most probable bytes; 0 is all.")
@option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Share of probability kept.")
@option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="Least probability, relative to the best byte's.")
@option("--seed", type=int, help="Fixes the bytes; without it every run differs.")
@option("--utf8", type=click.Choice(["strict", "raw"]), default="strict", help="strict: only well-formed UTF-8.")
@option("--chunks", is_flag=True, help="Colour the chunks by stage depth; on no terminal, put | between them.")
@option("--echo/--no-echo", default=None, show_default="on a terminal, and with --chunks", help="Show the prompt too.")
def generate(
    arguments: tuple[str, ...],
    *,
    max_tokens: int,
    utf8: str,
    seed: int | None,
    chunks: bool,
    echo: bool | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    **engine: Any,
) -> None:
    """Stream a completion of PROMPT to the terminal.

    With one argument: it is the MODEL if it is an existing path, `random:…`, `demo` or has the form of a hub id
    (owner/name); anything else is a PROMPT for HNET_MODEL or the demo model. PROMPT `-` reads standard input;
    without a PROMPT the model writes from the start of a document.
    """
    model, prompt = model_and_prompt(arguments)
    data = bytes([BOS]) + prompt
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=secrets.randbits(63) if seed is None else seed,
        utf8=utf8,  # type: ignore[arg-type]  # a choice of the option
        return_chunks=chunks,
    )
    loaded = load_engine(model, max_model_len=max(DEFAULT_MODEL_LEN, len(data) + max_tokens), **engine)
    outputs = loaded.stream(data, params)
    shows_prompt = (sys.stdout.isatty() or chunks) if echo is None else echo
    if chunks:
        _stream_chunks(outputs, data, shows_prompt=shows_prompt)
    elif utf8 == "raw" and not sys.stdout.isatty():
        _stream_bytes(outputs, prompt if shows_prompt else b"")
    else:
        _stream_text(outputs, prompt if shows_prompt else incomplete_tail(prompt))


def model_and_prompt(arguments: tuple[str, ...]) -> tuple[str | None, bytes]:
    """What `[MODEL] [PROMPT]` means, by the rule in the command's help."""
    from hnet_runtime.checkpoint.locate import is_model_name

    if len(arguments) > 2:
        raise click.UsageError(f"takes a MODEL and a PROMPT, not {len(arguments)} arguments; put the prompt in quotes")
    if len(arguments) == 2:
        model, prompt = arguments
    elif arguments and arguments[0] != "-" and is_model_name(arguments[0]):
        model, prompt = arguments[0], ""
    else:
        model, prompt = os.environ.get("HNET_MODEL", ""), arguments[0] if arguments else ""
    return model or None, read_bytes("-") if prompt == "-" else os.fsencode(prompt)


def _stream_text(outputs: Iterator[Output], begun: bytes) -> None:
    """`begun` is shown first: the prompt, or the first bytes of a character that the completion will finish."""
    decoder = TextDecoder()
    write(harmless(decoder.feed(begun)))
    for output in outputs:
        write(harmless(decoder.feed(output.data)))
        _raise_error(output)
    write(decoder.finish(drop_incomplete=False) + "\n")


def _stream_bytes(outputs: Iterator[Output], begun: bytes) -> None:
    write(begun)
    for output in outputs:
        write(output.data)
        _raise_error(output)


def _stream_chunks(outputs: Iterator[Output], prompt: bytes, *, shows_prompt: bool) -> None:
    """A verdict comes once its byte has been fed: the newest byte waits for the next output."""
    painter = ChunkPainter(colour=wants_colour(), start=0 if shows_prompt else len(prompt), clean=harmless)
    painter.add(prompt if shows_prompt else b"")
    for output in outputs:
        painter.opened(output.chunks)
        painter.add(output.data)
        if output.data:
            write(painter.take(hold=1))
        _raise_error(output)
    write(painter.finish() + "\n")


def _raise_error(output: Output) -> None:
    if output.finish_reason == "error":
        raise click.ClickException(output.error or "the engine gave up")
