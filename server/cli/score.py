"""`hnet score`: how well a model predicts a text, in bits per byte."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import click

from hnet_runtime.config import BOS
from hnet_runtime.engine.messages import SamplingParams
from server.cli.loading import DEFAULT_MODEL_LEN, load_engine, progress_bar
from server.cli.options import engine_options, option
from server.cli.segment import model_and_file
from server.cli.streams import read_bytes, write
from server.scoring import bits_per_byte, byte_logprobs, score


@click.command("score")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [FILE or -]")
@engine_options
@option("--max-model-len", type=click.IntRange(2), default=DEFAULT_MODEL_LEN, help="Bytes of a piece, BOS included.")
@option("--overlap", type=click.IntRange(0), default=0, help="Bytes of a piece that the next one reads again.")
@option("--json", "as_json", is_flag=True, help="Print what POST /v1/score answers.")
def score_file(arguments: tuple[str, ...], *, max_model_len: int, overlap: int, as_json: bool, **engine: Any) -> None:
    """Say how many bits per byte MODEL needs for a text: the mean of −log₂ p over its bytes.

    The text is FILE, or standard input for `-` and for no FILE; it may be any bytes. One argument that is a
    file and not a weight file is the FILE, for HNET_MODEL or the demo model.

    A text of --max-model-len bytes or more is cut into pieces that are scored one by one, each after BOS: the model
    does not know what was before. With --overlap a piece begins with that many bytes of the one before it,
    which count only there.
    """
    if overlap > max_model_len - 2:
        raise click.UsageError(f"--overlap {overlap} leaves no new byte to a piece of {max_model_len} bytes with BOS")
    model, name = model_and_file(arguments)
    data = read_bytes(name)
    if not (data or as_json):
        raise click.ClickException("the text is empty: there is nothing to score")
    loaded = load_engine(model, max_model_len=min(max_model_len, max(len(data) + 1, 2)), **engine)
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, utf8="raw")
    logprobs = array("d")
    num_pieces = num_read = 0
    with progress_bar("scoring") as progress:
        for piece, known in pieces(data, max_model_len - 1, overlap):
            (completion,) = loaded.generate([bytes([BOS]) + piece], params)
            if completion.finish_reason == "error":
                raise click.ClickException(completion.error or "the engine gave up")
            logprobs.extend(byte_logprobs(completion.prompt_logprobs[known:]))
            num_pieces, num_read = num_pieces + 1, num_read + len(piece) + 1
            if progress is not None:
                progress(len(logprobs), len(data))
    if num_pieces > 1:
        again = f" and the last {overlap} bytes before it" if overlap else ""
        click.echo(f"hnet: in {num_pieces} pieces of at most {max_model_len} bytes, each after BOS{again}", err=True)
    if as_json:
        write(json.dumps(score(loaded.info.model, logprobs, num_read)) + "\n")
    else:
        write(f"{bits_per_byte(logprobs):.4f} bits per byte over {len(data)} bytes\n")


def pieces(data: bytes, length: int, overlap: int) -> Iterator[tuple[bytes, int]]:
    """Cuts a text into pieces of at most `length` bytes → each with how many of its first bytes were in the last one.

    An empty text is one empty piece. `overlap` must be less than `length`.
    """
    start = 0
    while True:
        known = min(overlap, start)
        end = start + length - known
        yield data[start - known : end], known
        if end >= len(data):
            return
        start = end
