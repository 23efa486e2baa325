"""What a forward gives, whichever code ran it: logits, the routers' verdicts, and what each stage did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Verdicts:
    """What the router of one stage said of the positions it saw in one forward.

    rows, offsets: [T] row of each and the byte offset in the row's sequence of the byte it stands
    for (its first byte, where the position is itself a chunk); p: [T] fp32; boundary: [T].
    """

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    p: NDArray[np.float32]
    boundary: NDArray[np.bool_]


@dataclass(frozen=True)
class StageWork:
    """Positions one stage ran in one forward, and the seconds its own stacks took."""

    stage: int
    positions: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """logits: [n, V] fp32 of the positions asked for, row after row in the caller's order; verdicts of each routed
    stage, and work of each stage, that was reached."""

    logits: Tensor
    verdicts: tuple[Verdicts, ...]
    work: tuple[StageWork, ...]


@dataclass(frozen=True)
class StepResult:
    """One position of each of some rows. finished: [B] rows whose byte came to its end; the others are parked.
    logits: [finished ones, V] fp32; verdicts of each routed stage that ran, by stage; work of each stage that ran."""

    finished: NDArray[np.bool_]
    logits: Tensor
    verdicts: tuple[tuple[int, Verdicts], ...]
    work: tuple[StageWork, ...]
