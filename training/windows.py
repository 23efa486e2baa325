"""Windows of a text, in an order that a counter alone decides. Knows no model.

A text is documents one after another, each BOS + its symbols + EOS: bytes, or a tokenizer's ids (tokens.py). A window
is BOS and the symbols from some place on, whatever documents they are of; what is to be predicted is the symbol after
each of its own. A BOS is never asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BOS = 254
IGNORED = -100
"""A target that no loss counts; torch's own mark."""


@dataclass(frozen=True)
class Text:
    """symbols: [N] of any whole type; bos: theirs; lengths: [vocabulary] bytes of each symbol; name: for messages."""

    name: str
    symbols: NDArray[Any]
    bos: int
    lengths: NDArray[np.int64]

    @classmethod
    def of_bytes(cls, path: Path) -> Text:
        """A file of documents as `training.corpora` writes them, mapped."""
        return cls(str(path), np.memmap(path, dtype=np.uint8, mode="r"), BOS, np.ones(256, dtype=np.int64))


class Windows:
    """length: symbols of a window, BOS included. Raises ValueError naming a text that is too short."""

    def __init__(self, text: Text, length: int, seed: int) -> None:
        self._text, self._length, self._seed = text, length, seed
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        self.per_epoch = (len(text.symbols) - 2 * length) // length
        if self.per_epoch < 1:
            raise ValueError(f"{text.name}: {len(text.symbols)} symbols are too few for windows of {length}")

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows number `first` to `first + count` of a run without end: ([count, T] int64, targets of the same
        shape).

        An epoch takes every part of the text once, in an order of its own and cut at places of its own.
        """
        return self._cut([self._place(number) for number in range(first, first + count)])

    def bytes_of(self, first: int, count: int) -> int:
        """Bytes that these windows ask for."""
        return sum(
            int(self._text.lengths[self._symbols(self._place(each))].sum()) for each in range(first, first + count)
        )

    def evenly(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` windows spread over the text, always the same."""
        last = len(self._text.symbols) - self._length - 1
        return self._cut([last * index // max(count - 1, 1) for index in range(count)])

    def _place(self, number: int) -> int:
        epoch, within = divmod(number, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self._seed, epoch))
            offset = random.integers(self._length)
            self._epoch = epoch, offset + self._length * random.permutation(self.per_epoch)
        return int(self._epoch[1][within])

    def _symbols(self, place: int) -> NDArray[Any]:
        return self._text.symbols[place : place + self._length]

    def _cut(self, places: list[int]) -> tuple[Tensor, Tensor]:
        data = np.stack([self._symbols(place) for place in places]).astype(np.int64)
        targets = torch.from_numpy(data)
        bos = self._text.bos
        windows = torch.cat((torch.full((len(places), 1), bos), targets[:, :-1]), 1)
        return windows, targets.masked_fill(targets == bos, IGNORED)
