"""For benchmarks only: chunk boundaries drawn at a stated rate in place of the router's verdicts.

Random weights do not chunk like trained ones. The router still runs, so that its cost counts; only its
answer is replaced. Never part of serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

P_BOUNDARY, P_NONE = 0.75, 0.25
_GOLDEN, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class RouterOverride:
    """positions_per_chunk: mean positions of each routed stage in a chunk of the next (at least 1).

    Whether a position opens a chunk depends on seed, stage, row and position alone (splitmix64 of them).
    """

    positions_per_chunk: tuple[float, ...]
    seed: int = 0

    def rate(self, stage: int) -> float:
        return 1.0 / self.positions_per_chunk[stage]

    def p(self, stage: int, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """[T] p of each position in place of the router's; position 0 always opens a chunk."""
        with np.errstate(over="ignore"):
            key = np.uint64(self.seed) + np.uint64(stage << 56)
            z = key + (rows.astype(np.uint64) << np.uint64(32)) + positions.astype(np.uint64)
            z = z * _GOLDEN + _GOLDEN
            z = (z ^ (z >> np.uint64(30))) * _MIX1
            z = (z ^ (z >> np.uint64(27))) * _MIX2
            z = z ^ (z >> np.uint64(31))
        uniform = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
        opens = (uniform < self.rate(stage)) | (positions == 0)
        return np.where(opens, P_BOUNDARY, P_NONE).astype(np.float32)

    def static_p(self, stage: int, rows: Tensor, positions: Tensor) -> Tensor:
        """The same on the rows' device, for a static step: [B], [B] int64 → [B] fp32."""
        z = (rows << 32) + positions + _signed(self.seed + (stage << 56))
        z = z * _signed(int(_GOLDEN)) + _signed(int(_GOLDEN))
        z = (z ^ _shifted(z, 30)) * _signed(int(_MIX1))
        z = (z ^ _shifted(z, 27)) * _signed(int(_MIX2))
        z = z ^ _shifted(z, 31)
        uniform = _shifted(z, 11).double() * 2.0**-53
        opens = (uniform < self.rate(stage)) | (positions == 0)
        return torch.where(opens, P_BOUNDARY, P_NONE).float()


def _signed(number: int) -> int:
    """The int64 of the same 64 bits; sums and products wrap alike."""
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


def _shifted(z: Tensor, places: int) -> Tensor:
    """A shift to the right that fills up with zeros."""
    return (z >> places) & ((1 << (64 - places)) - 1)
