"""What a step makes smaller. Knows a forward's logits and routes; no optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.forward import Forwarded, Route, ratio_loss
from training.liveness import WHITE_SPACE
from training.settings import Chunking
from training.windows import IGNORED


@dataclass(frozen=True)
class Losses:
    """total is what is derived; the rest is for reading: bits per byte, and positions a chunk of each routed stage."""

    total: Tensor
    bits_per_byte: float
    positions_per_chunk: tuple[float, ...]


def losses(
    forwarded: Forwarded, windows: Tensor, targets: Tensor, chunking: Chunking, seen: int, lengths: Tensor | None = None
) -> Losses:
    """Cross entropy + α Σ ratio losses (+ guidance). windows, targets: [R, T]; seen: bytes seen before; lengths: [V]
    bytes of each symbol, where those are not bytes."""
    logits = forwarded.logits.reshape(-1, forwarded.logits.shape[-1])
    entropy = F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORED)
    total = entropy
    for stage, route in enumerate(forwarded.routes):
        total = total + chunking.alpha * ratio_loss(route, ratio_at(chunking, stage, seen))
    if chunking.guidance and forwarded.routes:
        total = total + chunking.guidance * _guidance(forwarded.routes[0], windows)
    shares = tuple(1 / max(float(route.boundary.mean()), 1e-9) for route in forwarded.routes)
    bits = float(entropy.detach()) / math.log(2)
    if lengths is not None:
        asked = targets[targets != IGNORED]
        bits *= len(asked) / float(lengths[asked].sum())
    return Losses(total, bits, shares)


def ratio_at(chunking: Chunking, stage: int, seen: int) -> float:
    """N of a stage after `seen` bytes: on its way from `start` for the first `annealing` of them."""
    ratio = chunking.ratio[stage]
    if chunking.start is None or seen >= chunking.annealing:
        return ratio
    start = chunking.start[stage]
    return start + (ratio - start) * seen / chunking.annealing


def _guidance(route: Route, windows: Tensor) -> Tensor:
    """Binary cross entropy of p towards the first of each run of white space; a window's first position is left out."""
    data = windows.t().reshape(-1).numpy()  # as packed: time, then window
    space = np.isin(data, sorted(WHITE_SPACE))
    count = len(windows)
    begins = space.copy()
    begins[count:] &= ~space[:-count]
    later = torch.from_numpy(route.spans.position_of > 0)
    wanted = torch.from_numpy(begins.astype(np.float32))
    return F.binary_cross_entropy(route.p[later].clamp(1e-6, 1 - 1e-6), wanted[later])
