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
from hnet_runtime.ops.drawing import MASKS, NUMBERS
from hnet_runtime.ops.entry import NO_BYTE

_STATES = 9  # of the automaton


class StepDraws:
    """For steps of up to `most` rows of `num_rows`. A row that nobody filled in draws as it may, and nobody asks what.

    next_bytes: [rows] int64 what each row drew last, where it may go on by itself; states: [rows] int64 the state of
    its automaton after that.
    """

    def __init__(self, most: int, num_rows: int, device: torch.device) -> None:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self._numbers = torch.zeros(len(NUMBERS), most, dtype=torch.float64, device=device)
        self._bytes = torch.ones(most, 2, VOCAB_SIZE, dtype=torch.bool, device=device)  # allowed, and at which to pause
        self._masks = torch.ones(_STATES * MASKS, VOCAB_SIZE, dtype=torch.bool, device=device)
        self._following = whole(_STATES * VOCAB_SIZE)
        self.next_bytes, self.states = whole(num_rows).fill_(NO_BYTE), whole(num_rows)
        # Two of each in turn: a step's are still on their way when those of the next are written.
        self._host_numbers = [pinned((len(NUMBERS), most), np.float64) for _ in range(2)]
        self._host_bytes = [pinned((most, 2, VOCAB_SIZE), np.bool_) for _ in range(2)]
        self._turn, self._num_new = 0, 0
        self.drawn: dict[int, int] = {}
        """Of the step that was read last, by place among the rows it was given: the byte of each row that came to its
        end, −1 where its logits are not all finite."""

    def teach(self, masks: NDArray[np.bool_], following: NDArray[np.int64]) -> None:
        """The automaton. masks: [8 · state + mask, V] the bytes that may come; following: [state, V] the state after
        each."""
        self._masks[: len(masks)].copy_(torch.from_numpy(masks))
        self._following.copy_(torch.from_numpy(following.reshape(-1)))

    def fill(self, numbers: NDArray[np.float64], allowed: NDArray[np.bool_], pauses: NDArray[np.bool_]) -> None:
        """For the rows of the step to come, in order. numbers: [7, B] NUMBERS; allowed: [B, V]; pauses: [B, V] the
        bytes after which a row does not go on by itself."""
        count = numbers.shape[1]
        self._turn = 1 - self._turn
        self._host_numbers[self._turn].numpy()[:, :count] = numbers
        given = self._host_bytes[self._turn].numpy()
        given[:count, 0], given[:count, 1] = allowed, pauses
        self._num_new = count

    def send(self) -> None:
        """Gives the device what was filled in since the last time."""
        if self._num_new:
            self._numbers.copy_(self._host_numbers[self._turn], non_blocking=True)
            given = self._host_bytes[self._turn]
            self._bytes[: self._num_new].copy_(given[: self._num_new], non_blocking=True)
            self._num_new = 0

    # ── in a step ─────────────────────────────────────────────────────────────────────────────────

    def draw(
        self,
        draw_step: Callable[..., None],
        projected: Tensor,
        rows: Tensor,
        places: Tensor | None,
        logits: Tensor,
        drawn: Tensor,
    ) -> None:
        """The next byte of `rows` [B], those at `places` of a step's batch or all of it; see `ops.drawing`."""
        bucket = len(rows)
        numbers, given = self._numbers[:, :bucket], self._bytes[:bucket]
        automaton = self._masks, self._following, self.states
        draw_step(projected, rows, places, numbers, given, *automaton, self.next_bytes, logits, drawn)

    def tensors(self) -> list[Tensor]:
        return [self._numbers, self._bytes, self._masks, self._following, self.next_bytes, self.states]
