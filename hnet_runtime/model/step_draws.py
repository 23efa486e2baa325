"""By what each row of a step draws its next byte inside the step, and where that byte goes: to the row's next step,
which may be given to the device before anybody has read it.

Knows numbers, masks and an automaton over bytes; not which request asks for them, nor where random numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.model.host_memory import pinned

NUMBERS = ("temperature", "top_p", "min_p", "uniform", "top_k", "follows", "mask_row")  # the last three whole
UNREAD = -1  # a byte that the device alone knows: the one it drew for the row last
_NONE = -1  # the next byte of a row that is over, or is not to go on before the host has looked
_MASK_ROWS = 72  # at most


class StepDraws:
    """For steps of up to `most` rows of `num_rows`. A row that nobody filled in draws as it may, and nobody asks what.

    Steps from stage 0 through all others, which alone are launched ahead, keep what their rows drew. next_bytes: [rows]
    int64 each row's byte, where it may go on by itself; states: [rows] int64 the automaton's state after that, as the
    first of its masks.
    """

    def __init__(self, most: int, num_rows: int, device: torch.device) -> None:
        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, dtype=torch.bool, device=device)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self._numbers = torch.zeros(len(NUMBERS), most, dtype=torch.float64, device=device)
        self._allowed, self._pauses = ones(most, VOCAB_SIZE), ones(most, VOCAB_SIZE)
        self._masks, self._following = ones(_MASK_ROWS, VOCAB_SIZE), whole(_MASK_ROWS, VOCAB_SIZE)
        self.next_bytes, self.states = whole(num_rows).fill_(_NONE), whole(num_rows)
        # Two of each in turn: a step's are still on their way when those of the next are written.
        self._host_numbers = [pinned((len(NUMBERS), most), np.float64) for _ in range(2)]
        self._host_allowed = [pinned((most, VOCAB_SIZE), np.bool_) for _ in range(2)]
        self._host_pauses = [pinned((most, VOCAB_SIZE), np.bool_) for _ in range(2)]
        self._turn, self._num_new = 0, 0
        self.drawn: dict[int, int] = {}
        """Of the step that was read last, by place among the rows it was given: the byte of each row that came to its
        end, −1 where its logits are not all finite."""

    def teach(self, masks: NDArray[np.bool_], following: NDArray[np.int64]) -> None:
        """The automaton. masks: [rows, V] the bytes that may come; following: [rows, V] the first mask of the state
        after each byte."""
        self._masks[: len(masks)].copy_(torch.from_numpy(masks))
        self._following[: len(following)].copy_(torch.from_numpy(following))

    def fill(self, numbers: NDArray[np.float64], allowed: NDArray[np.bool_], pauses: NDArray[np.bool_]) -> None:
        """For the rows of the step to come, in order. numbers: [7, B] NUMBERS: a row's mask, or where it `follows` a
        draw that nobody has read its place among those of the state that this leads to; allowed: [B, V] the bytes that
        may come, of one that follows all; pauses: [B, V] the bytes after which a row does not go on by itself."""
        count = numbers.shape[1]
        self._turn = 1 - self._turn
        self._host_numbers[self._turn].numpy()[:, :count] = numbers
        self._host_allowed[self._turn].numpy()[:count] = allowed
        self._host_pauses[self._turn].numpy()[:count] = pauses
        self._num_new = count

    def send(self) -> None:
        """Gives the device what was filled in since the last time."""
        count, turn = self._num_new, self._turn
        if count:
            self._numbers.copy_(self._host_numbers[turn], non_blocking=True)
            self._allowed[:count].copy_(self._host_allowed[turn][:count], non_blocking=True)
            self._pauses[:count].copy_(self._host_pauses[turn][:count], non_blocking=True)
            self._num_new = 0

    # ── in a step ─────────────────────────────────────────────────────────────────────────────────

    def enter(self, rows: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [B] that have a byte to run, padding in place of the others, and their bytes [B]: of `data`, or
        where those are UNREAD what the rows drew."""
        byte = torch.where(data == UNREAD, self.next_bytes.index_select(0, rows), data)
        return torch.where(byte == _NONE, 0, rows), byte.clamp(min=0)

    def draw(self, sample: Callable[..., Tensor], logits: Tensor, places: Tensor | None) -> Tensor:
        """The next byte [B] by logits [B, V], of rows at `places` of a step's batch or of all of it."""
        numbers, allowed = self._numbers[:, : len(logits)], self._allowed[: len(logits)]
        if places is not None:
            numbers, allowed = numbers.index_select(1, places), allowed.index_select(0, places)
        temperature, top_p, min_p, uniform, top_k, _, _ = numbers.contiguous().unbind(0)
        return sample(logits, allowed, temperature, top_p, min_p, uniform, top_k.long())

    def draw_and_keep(self, sample: Callable[..., Tensor], logits: Tensor, rows: Tensor) -> Tensor:
        """The next byte [B] of `rows` [B], a step's batch, by logits [B, V]; it is kept for their next step."""
        numbers = self._numbers[:, : len(logits)].contiguous()
        temperature, top_p, min_p, uniform = numbers[:4].unbind(0)
        top_k, follows, mask_row = numbers[4:].long().unbind(0)
        mask_row = mask_row + follows * self.states.index_select(0, rows)
        allowed = self._allowed[: len(logits)] & self._masks.index_select(0, mask_row)
        drawn = sample(logits, allowed, temperature, top_p, min_p, uniform, top_k)
        byte = drawn.clamp(min=0)[:, None]
        self.states.index_copy_(0, rows, self._following.index_select(0, mask_row).gather(1, byte).squeeze(1))
        pauses = self._pauses[: len(logits)].gather(1, byte).squeeze(1)
        self.next_bytes.index_copy_(0, rows, torch.where(pauses, _NONE, drawn))
        return drawn

    def tensors(self) -> list[Tensor]:
        return [
            *(self._numbers, self._allowed, self._pauses, self._masks, self._following),
            *(self.next_bytes, self.states),
        ]
