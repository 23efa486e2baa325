"""By what each row of a step draws its next byte inside the step, and what came: memory whose place never changes.

Knows numbers and masks; not which request asks for them, nor where random numbers come from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.model.host_memory import pinned

_NUMBERS = ("temperature", "top_p", "min_p", "uniform", "top_k")  # the last is whole, and exact in fp64


class StepDraws:
    """For steps of up to `most` rows. A row that nobody filled in draws as it may, and nobody asks what."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._numbers = torch.zeros(len(_NUMBERS), most, dtype=torch.float64, device=device)
        self._allowed = torch.ones(most, VOCAB_SIZE, dtype=torch.bool, device=device)
        self._host_numbers = pinned((len(_NUMBERS), most), np.float64)
        self._host_allowed = pinned((most, VOCAB_SIZE), np.bool_)
        self._num_new = 0
        self.drawn: dict[int, int] = {}
        """Of the last step, by place in its batch: the byte of each row that came to its end, −1 where its logits are
        not all finite."""

    def fill(self, numbers: NDArray[np.float64], allowed: NDArray[np.bool_]) -> None:
        """For the rows of the step to come, in order. numbers: [5, B] temperature, top_p, min_p, uniform and top_k;
        allowed: [B, V]."""
        count = numbers.shape[1]
        self._host_numbers.numpy()[:, :count] = numbers
        self._host_allowed.numpy()[:count] = allowed
        self._num_new = count

    def send(self) -> None:
        """Gives the device what was filled in since the last time."""
        if self._num_new:
            self._numbers.copy_(self._host_numbers, non_blocking=True)
            self._allowed[: self._num_new].copy_(self._host_allowed[: self._num_new], non_blocking=True)
            self._num_new = 0

    def of(self, bucket: int, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `sample_step` takes beside logits, for the rows of a batch or those at `places` of it."""
        numbers, allowed = self._numbers[:, :bucket], self._allowed[:bucket]
        if places is not None:
            numbers, allowed = numbers.index_select(1, places), allowed.index_select(0, places)
        temperature, top_p, min_p, uniform, top_k = numbers.contiguous().unbind(0)
        return allowed, temperature, top_p, min_p, uniform, top_k.long()

    def tensors(self) -> list[Tensor]:
        return [self._numbers, self._allowed]
