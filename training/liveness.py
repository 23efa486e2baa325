"""Does the output depend on the inner networks, and where do the chunks lie?

Knows a model's forward and windows of held-out text; nothing of optimizers. Every figure is over all positions of all
windows given.

A network that has died costs nothing when its output is swapped for another text's; its residual stream has mostly
grown to one constant vector. So bits per byte are taken with z̄ of each routed stage as computed, and with three wrong
ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.config import StackConfig
from hnet_runtime.ops.spans import Spans
from training.forward import Alter, Forwarded, Route, TrainableHNet
from training.windows import IGNORED

WHITE_SPACE = frozenset(b" \t\n\r\f\v")
PUNCTUATION = frozenset(b"!\"#%&'()*,-./:;?@[]_{}")
WRONG = ("mean", "other", "stale")
"""In place of z̄: its mean over everything; that of another window at the same place; that of the chunk before."""


@dataclass
class StageLiveness:
    """bits: bits per byte with each of `WRONG`; cost is what one adds. bytes_per_chunk: of the text, at any stage."""

    bits: dict[str, float] = field(default_factory=dict)
    positions_per_chunk: float = 0.0
    bytes_per_chunk: float = 0.0
    at_space: float = 0.0
    """Share of chunks opened by white space or by the byte after it."""
    at_punctuation: float = 0.0
    """Share of chunks opened by a punctuation mark or by the byte after one."""
    length_entropy: float = 0.0
    """Bits of the distribution of chunk lengths, in positions."""
    mean_p: float = 0.0


@dataclass
class LayerResidual:
    """rms of the stream after the layer, and the share of its mean square that is the mean vector's."""

    rms: float
    constant_share: float


@dataclass
class Liveness:
    """bits_per_byte: as computed. stages: routed ones, outermost first; main: the main network layer by layer."""

    bits_per_byte: float
    stages: list[StageLiveness]
    main: list[LayerResidual]


def measure(
    model: TrainableHNet, windows: Tensor, targets: Tensor, micro: int = 4, lengths: Tensor | None = None
) -> Liveness:
    """windows, targets: [R, T]; R at least 2. `micro` windows go at a time. lengths: [V] bytes of each symbol, where
    those are not bytes."""
    parts = _parts(len(windows), micro)
    main = _Residuals(model)
    means = [_Mean() for _ in range(model.config.num_routed_stages)]
    boundaries = [_Boundaries() for _ in means]

    def keep_means(stage: int, z_bar: Tensor, route: Route) -> Tensor:
        means[stage].add(z_bar)
        return z_bar

    exact = _Bits(lengths)
    with torch.no_grad():
        for part in parts:
            forwarded = model.forward(windows[part], alter=keep_means, watch=main.add)
            exact.add(forwarded, targets[part])
            opens = windows[part].t().reshape(-1).numpy()
            for stage, route in enumerate(forwarded.routes):
                boundaries[stage].add(route, opens)
                opens = _openers(route, opens)
        stages = []
        num_bytes = windows.numel()
        for stage in range(len(means)):
            found = boundaries[stage].result(num_bytes)
            for wrong in WRONG:
                bits = _Bits(lengths)
                for part in parts:
                    alter = _altered(stage, wrong, means[stage].value())
                    bits.add(model.forward(windows[part], alter=alter), targets[part])
                found.bits[wrong] = bits.value()
            stages.append(found)
    return Liveness(exact.value(), stages, main.result())


def bits_per_byte(
    model: TrainableHNet, windows: Tensor, targets: Tensor, micro: int = 4, lengths: Tensor | None = None
) -> float:
    """`measure`'s first figure alone."""
    bits = _Bits(lengths)
    with torch.no_grad():
        for part in _parts(len(windows), micro):
            bits.add(model.forward(windows[part]), targets[part])
    return bits.value()


def _parts(count: int, micro: int) -> list[slice]:
    """Windows that go together: never one alone, which has no other, where there are several."""
    parts = [slice(start, start + micro) for start in range(0, count, micro)]
    if len(parts) > 1 and count % micro == 1:
        parts[-2:] = [slice(parts[-2].start, count)]
    return parts


def _openers(route: Route, opens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The byte that opens each position of the next stage, in its packed order."""
    inner = np.empty(route.inner.total, dtype=np.int64)
    chosen = np.flatnonzero(route.boundary)
    inner[route.chunk[chosen]] = opens[chosen]
    return inner


def _altered(stage: int, wrong: str, mean: Tensor) -> Alter:
    def alter(at: int, z_bar: Tensor, route: Route) -> Tensor:
        if at != stage:
            return z_bar
        if wrong == "mean":
            return mean.expand_as(z_bar)
        index = _of_another_span(route.spans) if wrong == "other" else _of_the_chunk_before(route)
        return z_bar.index_select(0, torch.from_numpy(index))

    return alter


def _of_another_span(spans: Spans) -> NDArray[np.int64]:
    """[T] the packed place of the same time in the next span, as near as it reaches."""
    other = (spans.span_of + 1) % len(spans)
    time = np.minimum(spans.time_of, spans.lengths[other] - 1)
    index: NDArray[np.int64] = spans.offsets[time] + other
    return index


def _of_the_chunk_before(route: Route) -> NDArray[np.int64]:
    """[T] a place that is in the chunk before a position's own; in the first chunk, its own."""
    inner = route.inner
    opener = np.empty(inner.total, dtype=np.int64)
    chosen = np.flatnonzero(route.boundary)
    opener[route.chunk[chosen]] = chosen
    time = np.maximum(inner.time_of[route.chunk] - 1, 0)
    before: NDArray[np.int64] = opener[inner.offsets[time] + inner.span_of[route.chunk]]
    return before


class _Bits:
    def __init__(self, lengths: Tensor | None) -> None:
        self._nats, self._count, self._lengths = 0.0, 0, lengths

    def add(self, forwarded: Forwarded, targets: Tensor) -> None:
        logits = forwarded.logits.reshape(-1, forwarded.logits.shape[-1])
        self._nats += float(F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORED, reduction="sum"))
        asked = targets[targets != IGNORED]
        self._count += len(asked) if self._lengths is None else int(self._lengths[asked].sum())

    def value(self) -> float:
        return self._nats / self._count / math.log(2)


class _Mean:
    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, values: Tensor) -> None:
        self._sum = self._sum + values.double().sum(0)
        self._count += len(values)

    def value(self) -> Tensor:
        assert isinstance(self._sum, Tensor)
        return (self._sum / self._count).float()


class _Residuals:
    def __init__(self, model: TrainableHNet) -> None:
        self._square: dict[int, float] = {}
        self._means: dict[int, _Mean] = {}
        self._prefix = model.config.stages[-1].stack("main").prefix

    def add(self, stack: StackConfig, layer: int, residual: Tensor) -> None:
        if stack.prefix != self._prefix:
            return
        self._square[layer] = self._square.get(layer, 0.0) + float(residual.double().square().sum())
        self._means.setdefault(layer, _Mean()).add(residual)

    def result(self) -> list[LayerResidual]:
        layers = []
        for layer, mean in sorted(self._means.items()):
            vector = mean.value()
            square = self._square[layer] / (mean._count * len(vector))
            layers.append(LayerResidual(math.sqrt(square), float(vector.double().square().mean()) / square))
        return layers


class _Boundaries:
    """What opens the chunks of one stage, over all windows but each one's first position, which always does."""

    def __init__(self) -> None:
        self._positions = self._chunks = self._spaces = self._marks = 0
        self._p = 0.0
        self._lengths: dict[int, int] = {}

    def add(self, route: Route, opens: NDArray[np.int64]) -> None:
        spans = route.spans
        later = spans.position_of > 0
        chosen = np.flatnonzero(route.boundary & later)
        before = opens[spans.predecessor.numpy()[chosen] - len(spans)]
        self._chunks += len(chosen)
        self._positions += int(later.sum())
        self._spaces += _count_either(opens[chosen], before, WHITE_SPACE)
        self._marks += _count_either(opens[chosen], before, PUNCTUATION)
        self._p += float(route.p.detach().double()[torch.from_numpy(later)].sum())
        lengths = np.bincount(route.chunk, minlength=route.inner.total)
        for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
            self._lengths[int(length)] = self._lengths.get(int(length), 0) + int(count)

    def result(self, num_bytes: int) -> StageLiveness:
        chunks = max(self._chunks, 1)
        counts = np.array(list(self._lengths.values()), dtype=np.float64)
        shares = counts / counts.sum()
        return StageLiveness(
            positions_per_chunk=self._positions / chunks,
            bytes_per_chunk=num_bytes / max(counts.sum(), 1),
            at_space=self._spaces / chunks,
            at_punctuation=self._marks / chunks,
            length_entropy=float(-(shares * np.log2(shares)).sum()),
            mean_p=self._p / max(self._positions, 1),
        )


def _count_either(opens: NDArray[np.int64], before: NDArray[np.int64], wanted: frozenset[int]) -> int:
    members = np.array(sorted(wanted))
    return int((np.isin(opens, members) | np.isin(before, members)).sum())
