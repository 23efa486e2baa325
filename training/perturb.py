"""Held-out text made harder letter by letter, for how sturdily a model reads: `python -m training.perturb DATA KIND
OUTPUT`.

Knows files of documents. What becomes of a document depends on its number, the kind and the seed alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

SHARE = 0.05  # of letters, in typos
DROPPED = 0.15  # of spaces
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)


def upper(text: bytes, random: np.random.Generator) -> bytes:
    """All in capitals."""
    del random
    return text.decode().upper().encode()


def mixed(text: bytes, random: np.random.Generator) -> bytes:
    """Each letter a capital or not by chance."""
    letters = text.decode()
    return "".join(
        each.upper() if up else each.lower()
        for each, up in zip(letters, random.random(len(letters)) < 0.5, strict=True)
    ).encode()


def typos(text: bytes, random: np.random.Generator) -> bytes:
    """One letter in twenty left out, doubled, changed for its neighbour, or another one in its place."""
    out = bytearray()
    place = 0
    while place < len(text):
        letter = text[place]
        if not (65 <= letter <= 90 or 97 <= letter <= 122) or random.random() >= SHARE:
            out.append(letter)
        else:
            kind = random.integers(4)
            following = text[place + 1 : place + 2]
            if kind == 1:
                out += bytes((letter, letter))
            elif kind == 2 and following.isalpha():
                out += following + bytes((letter,))
                place += 1
            elif kind == 3:
                out.append(int(random.choice(_LETTERS)))
        place += 1
    return bytes(out)


def dropped_spaces(text: bytes, random: np.random.Generator) -> bytes:
    """About one space in seven gone."""
    kept = random.random(len(text)) >= DROPPED
    return bytes(byte for byte, keep in zip(text, kept, strict=True) if keep or byte != 32)


KINDS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "upper": upper,
    "mixed": mixed,
    "typos": typos,
    "dropped-spaces": dropped_spaces,
}


def perturbed(data: bytes, kind: str, seed: int = 1) -> bytes:
    """Documents, each BOS + UTF-8 + EOS, with their texts changed."""
    documents = [part.removesuffix(b"\xff") for part in data.split(b"\xfe")[1:]]
    change = KINDS[kind]
    return b"".join(
        b"\xfe" + change(text, np.random.default_rng((seed, number))) + b"\xff" for number, text in enumerate(documents)
    )


@click.command("perturb")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("kind", type=click.Choice(sorted(KINDS)))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def perturb(data: Path, kind: str, output: Path) -> None:
    """Write DATA's documents, changed as KIND says, to OUTPUT, for `python -m training.evaluate`."""
    output.write_bytes(perturbed(data.read_bytes(), kind))


if __name__ == "__main__":
    sys.exit(perturb())
