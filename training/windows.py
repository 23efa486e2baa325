"""Windows of a file of documents, in an order that a counter alone decides. Knows no model.

A file holds documents one after another, each BOS + UTF-8 + EOS. A window is BOS and the bytes from some place on,
whatever documents they are of; what is to be predicted is the byte after each of its bytes. A BOS is never asked for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BOS = 254
IGNORED = -100
"""A target that no loss counts; torch's own mark."""


class Windows:
    """length: bytes of a window, BOS included."""

    def __init__(self, path: Path, length: int, seed: int) -> None:
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._length, self._seed = length, seed
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        self.per_epoch = (len(self._bytes) - 2 * length) // length
        if self.per_epoch < 1:
            raise ValueError(f"{path}: {len(self._bytes)} bytes are too few for windows of {length}")

    @property
    def num_bytes(self) -> int:
        return len(self._bytes)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows number `first` to `first + count` of a run without end: ([count, T] int64, targets of the same
        shape).

        An epoch takes every part of the file once, in an order of its own and cut at places of its own.
        """
        return self._cut([self._place(number) for number in range(first, first + count)])

    def evenly(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` windows spread over the file, always the same."""
        last = len(self._bytes) - self._length - 1
        return self._cut([last * index // max(count - 1, 1) for index in range(count)])

    def _place(self, number: int) -> int:
        epoch, within = divmod(number, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self._seed, epoch))
            offset = random.integers(self._length)
            self._epoch = epoch, offset + self._length * random.permutation(self.per_epoch)
        return int(self._epoch[1][within])

    def _cut(self, places: list[int]) -> tuple[Tensor, Tensor]:
        data = np.stack([self._bytes[place : place + self._length] for place in places]).astype(np.int64)
        targets = torch.from_numpy(data)
        windows = torch.cat((torch.full((len(places), 1), BOS), targets[:, :-1]), 1)
        return windows, targets.masked_fill(targets == BOS, IGNORED)
