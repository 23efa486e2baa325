"""Texts, and crowds of rows that come and go: what the exactness tests of every runtime read and compare by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

TEXTS = [
    b"\xfe",
    b"\xfeA",
    b"\xfe" + "Grüße, 世界! 🦊 naïve café — Привет, мир".encode(),
    b"\xfe" + b"Once upon a time there was a clockmaker who owned 31 clocks, none of which agreed. " * 2,
    b"\xfeT" + b"T" * 70,
    b"\xfe" + bytes(range(256))[:200],
    b"\xfe" + b"x = [f(y) for y in range(10)]\n\n\treturn x, {'a': 1}\n" * 3,
    b"\xfe" + b"aaaa bbbb aaaa bbbb " * 5,
    b"not even a BOS in front of this one, which is a hundred and more bytes long, for what it is worth here.",
    b"\xfe" + b"\x80\xff\x00\xc3" * 16,
    b"\xfe" + b"The quick brown fox jumps over the lazy dog while 17 owls watch.",
    b"\xfe" + b"0123456789" * 13,
    b"\xfe\xfe\xff",
    b"\xfe" + b"Short words, long silences.",
    b"\xfe" + b"(((((((((())))))))))[[[[]]]]{}{}{}" * 2,
    b"\xfe" + b"a" * 127,
]


def assert_same(heard: Any, expected: Any, positions: int | None = None) -> None:
    """Logits and verdicts equal to the bit; of the first `positions` bytes, if not all."""
    count = len(expected.logits) if positions is None else positions
    assert expected.logits.isfinite().all()
    assert torch.equal(heard.logits[:count], expected.logits[:count])
    for said, truth in zip(heard.verdicts, expected.verdicts, strict=True):
        assert [verdict for verdict in said if verdict[0] < count] == [
            verdict for verdict in truth if verdict[0] < count
        ]


def random_schedule(lengths: list[int], rng: random.Random) -> Iterator[dict[int, int]]:
    """Ticks of a crowd: texts come at random times, in pieces of random lengths, and leave when read.

    Yields {text: bytes it feeds}, in random order, until every text is read.
    """
    left = dict(enumerate(lengths))
    starts = {text: rng.randrange(12) for text in left}
    tick = 0
    while left:
        present = [text for text in left if starts[text] <= tick and rng.random() < 0.9]
        rng.shuffle(present)
        pieces = {}
        for text in present:
            pieces[text] = min(rng.choice([1, 1, 1, 2, 7, rng.randrange(1, 80), left[text]]), left[text])
            left[text] -= pieces[text]
            if not left[text]:
                del left[text]
        if pieces:
            yield pieces
        tick += 1


def crowd_against_alone(rows: Any, alone: Callable[[bytes], Any], texts: list[bytes], seed: int) -> None:
    """Texts come and go at random on rows handed on at random; each must hear what it hears alone."""
    rng = random.Random(seed)
    free = list(range(1, rows.num_rows + 1))
    rng.shuffle(free)
    row_of: dict[int, int] = {}
    fed = [0] * len(texts)
    for pieces in random_schedule([len(text) for text in texts], rng):
        for text in pieces:
            if text not in row_of:
                row_of[text] = free.pop()
                rows.open(row_of[text])
        rows.feed({row_of[text]: texts[text][fed[text] : fed[text] + size] for text, size in pieces.items()})
        for text, size in pieces.items():
            fed[text] += size
            if fed[text] == len(texts[text]):
                assert_same(rows.close(row_of[text]), alone(texts[text]))
                free.insert(rng.randrange(len(free) + 1), row_of[text])
    assert fed == [len(text) for text in texts]
