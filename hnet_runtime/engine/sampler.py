"""From logits to the next byte, for many rows at once. Knows tensors; no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE
from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import ByteLogprobs, SamplingParams
from hnet_runtime.model.step_draws import StepDraws
from hnet_runtime.ops.drawing import AS_GIVEN, AS_LEFT, NUMBERS
from hnet_runtime.ops.native import binding

_MASKS = 2 * utf8.LONGEST  # rows of utf8.mask_table for each state


@dataclass(frozen=True)
class RowSampling:
    """What one row brings to a draw: its parameters, a row of utf8.mask_table, and a number in [0, 1).

    allowed: [V] the bytes that may come, at least one, where no row of the table says it. pauses: [V] the bytes after
    which the row is not to go on before somebody has looked at them; None where that is any. follows: the draw comes
    after one that is not known yet: the row of the table is that of the state this leads to.
    """

    params: SamplingParams
    mask_row: int
    uniform: float
    allowed: NDArray[np.bool_] | None = None
    pauses: NDArray[np.bool_] | None = None
    follows: bool = False


class Sampler:
    """Chooses bytes on the device. Each row's byte depends on its own logits and RowSampling alone."""

    draws_ahead = False
    """Whether it wants to know, before a step runs, what its rows will draw by."""

    def expect(self, rows: Sequence[RowSampling | None]) -> None:
        """What the rows of the step about to run will draw by, in order; None where that is not known yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._masks = torch.from_numpy(utf8.mask_table()).to(device)

    def draw(self, logits: Tensor, rows: Sequence[RowSampling]) -> list[int | None]:
        """The next byte of each row: [B, V] fp32 → B bytes, None for a row whose logits are not all finite."""
        sound = torch.isfinite(logits).all(-1).tolist()
        if all(sound):
            drawn: list[int | None] = self.sample(logits, rows).tolist()
            return drawn
        kept = [index for index, is_sound in enumerate(sound) if is_sound]
        found: list[int | None] = [None] * len(rows)
        if kept:
            for index, byte in zip(kept, self.sample(logits[kept], [rows[i] for i in kept]).tolist(), strict=True):
                found[index] = byte
        return found

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
        """The next byte of each row: [B, V] fp32 → [B] int64.

        Temperature 0 takes the largest allowed logit, ties to the lowest byte. Otherwise top-k, then top-p of what it
        leaves, then min-p (relative to the most probable byte) cut the distribution at the given temperature,
        and the inverse of its cumulative sum in byte order is taken at the row's uniform number.
        """
        allowed = self._masks[torch.tensor([row.mask_row for row in rows], device=self._device)]
        for index, row in enumerate(rows):
            if row.allowed is not None:
                allowed[index] = torch.from_numpy(row.allowed).to(self._device)
        logits = logits.masked_fill(~allowed, float("-inf"))
        greedy = logits.argmax(-1)  # the first of equals
        if all(row.params.temperature == 0.0 for row in rows):
            return greedy
        temperature = self._column([row.params.temperature or 1.0 for row in rows])
        wide = logits.double()
        # The largest is taken off first: divided by a temperature near 0 it would be infinite.
        weights = torch.exp((wide - wide.amax(-1, keepdim=True)) / temperature)
        if any(row.params.top_k or row.params.top_p < 1.0 or row.params.min_p for row in rows):
            weights = self._cut(weights, [row.params for row in rows])
        cumulative = weights.cumsum(-1)
        target = cumulative[:, -1:] * self._column([row.uniform for row in rows])
        # The first byte whose cumulative weight exceeds the target; rounding must not carry it past the last.
        drawn = torch.searchsorted(cumulative, target, right=True)
        last = VOCAB_SIZE - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
        drawn = torch.minimum(drawn, last).squeeze(-1)
        is_greedy = torch.tensor([row.params.temperature == 0.0 for row in rows], device=self._device)
        return torch.where(is_greedy, greedy, drawn)

    def _cut(self, weights: Tensor, params: list[SamplingParams]) -> Tensor:
        """Sets to 0 the bytes that top-k, top-p and min-p leave out: [B, V] → [B, V], all fp64."""
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(VOCAB_SIZE, device=self._device)
        top_k = torch.tensor([[min(p.top_k or VOCAB_SIZE, VOCAB_SIZE)] for p in params], device=self._device)
        kept = torch.where(rank < top_k, ordered, 0.0)
        before = kept.cumsum(-1) - kept
        top_p = self._column([p.top_p for p in params])
        # At 1.0 nothing is cut, whatever the rounding of the sums.
        inside = (before < top_p * kept.sum(-1, keepdim=True)) | (top_p >= 1.0)
        above = ordered >= self._column([p.min_p for p in params]) * ordered[:, :1]
        return torch.zeros_like(weights).scatter_(-1, order, torch.where(inside & above, kept, 0.0))

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device).unsqueeze(-1)


class CapturedSampler(Sampler):
    """The same where steps draw themselves: what was expected has been drawn when the step is over, by the logits it
    gave. What was not is drawn as ever."""

    draws_ahead = True

    def __init__(self, device: torch.device, draws: StepDraws) -> None:
        super().__init__(device)
        self._draws = draws
        self._table = utf8.mask_table()
        draws.teach(self._table, utf8.state_table())
        self._expected: tuple[Sequence[RowSampling | None], ...] = ((), ())  # of the step before, and of the last
        self._places: dict[int, int] = {}  # by id of what is kept alive in `_expected`

    def expect(self, rows: Sequence[RowSampling | None]) -> None:
        self._expected = (self._expected[-1], list(rows))
        self._places = {id(row): place for each in self._expected for place, row in enumerate(each) if row is not None}
        numbers = np.zeros((len(NUMBERS), len(rows)))
        numbers[-1] = AS_GIVEN
        allowed = np.ones((len(rows), VOCAB_SIZE), dtype=np.bool_)
        pauses = allowed.copy()
        for place, row in enumerate(rows):
            if row is None:
                continue
            params = row.params
            state, mask = divmod(row.mask_row, _MASKS)
            numbers[:5, place] = (params.temperature, params.top_p, params.min_p, row.uniform, params.top_k)
            numbers[5:, place] = (AS_LEFT if row.follows else state, mask if row.allowed is None else AS_GIVEN)
            if row.allowed is not None:
                allowed[place] = row.allowed
            if row.pauses is not None:
                pauses[place] = row.pauses
        self._draws.fill(numbers, allowed, pauses)

    def draw(self, logits: Tensor, rows: Sequence[RowSampling]) -> list[int | None]:
        places = [self._places.get(id(row), -1) for row in rows]
        left = [index for index, place in enumerate(places) if place not in self._draws.drawn]
        found = [self._draws.drawn.get(place) for place in places]
        drawn = [None if byte is None or byte < 0 else byte for byte in found]
        if left:
            for index, byte in zip(left, super().draw(logits[left], [rows[each] for each in left]), strict=True):
                drawn[index] = byte
        return drawn


class NativeSampler(Sampler):
    """The same on a CPU in one call of the native library."""

    def __init__(self, library: Any) -> None:
        super().__init__(torch.device("cpu"))
        self._call = library.hnet_sample
        self._table = utf8.mask_table()
        self._first_mask = self._table.ctypes.data

    def draw(self, logits: Tensor, rows: Sequence[RowSampling]) -> list[int | None]:
        draws = (binding.Draw * len(rows))(
            *(
                binding.Draw(
                    row.params.temperature,
                    row.params.top_p,
                    row.params.min_p,
                    row.uniform,
                    min(row.params.top_k, VOCAB_SIZE),
                    self._first_mask + row.mask_row * VOCAB_SIZE if row.allowed is None else row.allowed.ctypes.data,
                )
                for row in rows
            )
        )
        drawn = np.empty(len(rows), dtype=np.int64)
        logits = logits.contiguous()
        self._call(len(rows), logits.data_ptr(), draws, drawn.ctypes.data)
        return [None if byte < 0 else byte for byte in drawn.tolist()]


@torch.inference_mode()
def byte_logprobs(logits: Tensor, data: bytes, tops: Sequence[int]) -> list[ByteLogprobs]:
    """The model's own log-probabilities of bytes that came: logits [T, V] fp32, one row a byte of `data`.

    `tops` alternatives each, best first, ties to the lowest byte.
    """
    wide = logits.double()
    wide = wide - wide.amax(-1, keepdim=True)
    logprobs = wide - torch.log(torch.exp(wide).sum(-1, keepdim=True))
    chosen = torch.tensor(list(data), device=logits.device).unsqueeze(-1)
    own = logprobs.gather(-1, chosen).squeeze(-1).tolist()
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    ranks = ((order == chosen).int().argmax(-1) + 1).tolist()
    most = max(tops, default=0)
    best, numbers = ordered[:, :most].tolist(), order[:, :most].tolist()
    return [
        ByteLogprobs(byte, logprob, tuple(zip(numbers[i][:top], best[i][:top], strict=True)), ranks[i])
        for i, (byte, logprob, top) in enumerate(zip(data, own, tops, strict=True))
    ]
