"""The batched runtime against `model/reference.py`, and against itself, over one text.

Knows a model's weights and nothing of requests: a prompt read whole against byte by byte, a row alone
against the same row in a crowd. Returns figures beside what they must be.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.reference import Reference
from hnet_runtime.model.results import Verdicts
from hnet_runtime.state.rows import PAGE, pages_for

_CROWD = 8  # rows that run beside each other

# The reference's own drift from step to step is 1e-4 in float32. In bfloat16 the same sums, arranged otherwise,
# round elsewhere, and a rounding may carry a boundary over its threshold.
_FLOAT32_MAX = 1e-3
_BFLOAT16_RMS, _BFLOAT16_ARGMAX, _BFLOAT16_FLIPS = 0.5, 0.75, 0.01


@dataclass(frozen=True)
class Trace:
    """What a model made of T bytes.

    logits: [T, 256] float32. `positions[s]` are the byte offsets of the positions of routed stage s, in
    order; `boundaries[s]` are those among them that opened a chunk.
    """

    logits: Tensor
    positions: tuple[tuple[int, ...], ...]
    boundaries: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Difference:
    """Between two traces: of their logits, the share of positions with the same most probable byte, and
    for each routed stage how many boundaries only one of the two has, of how many positions."""

    max_abs: float
    rms: float
    same_argmax: float
    flips: tuple[int, ...]
    positions: tuple[int, ...]
    bitwise: bool


@dataclass(frozen=True)
class Check:
    """One comparison, what was demanded of it, and whether that held."""

    name: str
    demand: str
    passed: bool
    difference: Difference


@dataclass(frozen=True)
class StepTime:
    """Median seconds of a step of one row that ran every stage down to `stage` and no further; over `count` steps."""

    stage: int
    count: int
    seconds: float


def check_runtime(
    config: ModelConfig, weights: Mapping[str, Tensor], data: bytes
) -> tuple[tuple[Check, ...], tuple[StepTime, ...]]:
    """Three comparisons over `data` (BOS first), and the times of the steps that one of them took."""
    network = HNet(config, weights)
    whole, _ = trace_runtime(network, [[data]])
    steps, times = trace_runtime(network, [_pieces(data, 1)])
    # The row comes in spans of 7, among others of other texts and lengths that start and stop at other places.
    crowd = [_pieces(data, 7)]
    for neighbour in range(1, _CROWD):
        other = data[:1] + data[1 + neighbour * 5 :][: len(data) // 2 + neighbour]
        crowd.append(_pieces(other, neighbour))
    crowded, _ = trace_runtime(network, crowd)
    # On a CPU in float32 every number of a row is a function of its bytes alone; elsewhere the bytes agree.
    exact = network.device.type == "cpu" and network.dtype is torch.float32
    coarse = network.dtype is not torch.float32
    checks = (
        check("runtime against the reference", trace_reference(config, weights, data), whole, coarse=coarse),
        check("read whole against byte by byte", whole, steps, coarse=coarse, exact=exact),
        check("alone against in a crowd", whole, crowded, coarse=coarse, exact=exact),
    )
    return checks, times


def check(name: str, expected: Trace, found: Trace, *, coarse: bool, exact: bool = False) -> Check:
    """Compares two traces of the same bytes: to the bit, or as close as float32 or (`coarse`) bfloat16 allows."""
    apart = compare(expected, found)
    if exact:
        return Check(name, "the same bits", apart.bitwise, apart)
    if not coarse:
        demand = f"logits within {_FLOAT32_MAX:g}, no boundary flipped"
        return Check(name, demand, apart.max_abs <= _FLOAT32_MAX and not any(apart.flips), apart)
    demand = (
        f"rms of logits within {_BFLOAT16_RMS:g}, same best byte at {_BFLOAT16_ARGMAX:.0%},"
        f" at most {_BFLOAT16_FLIPS:.0%} of boundaries flipped"
    )
    few_flips = all(
        flips <= max(1, _BFLOAT16_FLIPS * count) for flips, count in zip(apart.flips, apart.positions, strict=True)
    )
    close = apart.rms <= _BFLOAT16_RMS and apart.same_argmax >= _BFLOAT16_ARGMAX
    return Check(name, demand, close and few_flips, apart)


def compare(expected: Trace, found: Trace) -> Difference:
    """How far apart two traces of the same bytes are; NaN where either has one."""
    gap = found.logits - expected.logits
    same = expected.logits.argmax(-1) == found.logits.argmax(-1)
    return Difference(
        max_abs=float(gap.abs().max()),
        rms=float(gap.square().mean().sqrt()),
        same_argmax=float(same.float().mean()),
        flips=tuple(len(one ^ other) for one, other in zip(expected.boundaries, found.boundaries, strict=True)),
        positions=tuple(len(positions) for positions in expected.positions),
        bitwise=torch.equal(expected.logits, found.logits) and expected.boundaries == found.boundaries,
    )


def trace_reference(config: ModelConfig, weights: Mapping[str, Tensor], data: bytes) -> Trace:
    """The oracle's trace of `data`."""
    device = weights["embeddings.weight"].device
    output = Reference(config, weights).forward(torch.tensor(list(data), device=device))
    offsets = tuple(range(len(data)))
    positions, boundaries = [], []
    for opens in output.boundaries:
        positions.append(offsets)
        offsets = tuple(offset for offset, opened in zip(offsets, opens.tolist(), strict=True) if opened)
        boundaries.append(frozenset(offsets))
    return Trace(output.logits.float().cpu(), tuple(positions), tuple(boundaries))


def trace_runtime(network: HNet, rows: Sequence[Sequence[bytes]]) -> tuple[Trace, tuple[StepTime, ...]]:
    """The runtime's trace of row 0, run among the others: each row is the pieces it is fed, one a turn.

    Also the times of the turns in which one row alone took one byte.
    """
    longest = max(sum(map(len, pieces)) for pieces in rows)
    state = network.new_state(
        num_rows=len(rows), kv_positions=len(rows) * pages_for(longest) * PAGE, max_positions=longest
    )
    numbers = range(1, len(rows) + 1)
    for pool in state.page_pools:
        for number in numbers:
            pool.reserve(number, longest)
    state.reset(list(numbers))
    logits: list[Tensor] = []
    positions: list[list[int]] = [[] for _ in range(network.config.num_routed_stages)]
    boundaries: list[set[int]] = [set() for _ in positions]
    times: dict[int, list[float]] = {}
    for turn in range(max(map(len, rows))):
        live = [(number, pieces[turn]) for number, pieces in zip(numbers, rows, strict=True) if turn < len(pieces)]
        started = time.perf_counter()
        forward = network.forward(state, [number for number, _ in live], [piece for _, piece in live])
        found = network.logits(forward.hidden).cpu()
        if len(live) == 1 and len(live[0][1]) == 1:
            times.setdefault(len(forward.work) - 1, []).append(time.perf_counter() - started)
        if live[0][0] == 1:
            logits.append(found[forward.places(0).cpu()])
        for stage, said in enumerate(forward.verdicts):
            _note(said, positions[stage], boundaries[stage])
    trace = Trace(
        torch.cat(logits), tuple(tuple(offsets) for offsets in positions), tuple(frozenset(each) for each in boundaries)
    )
    return trace, tuple(StepTime(stage, len(seconds), median(seconds)) for stage, seconds in sorted(times.items()))


def _note(said: Verdicts, positions: list[int], boundaries: set[int]) -> None:
    """Keeps what a router said of row 1."""
    ours = said.rows == 1
    offsets = said.offsets[ours].tolist()
    positions += offsets
    boundaries.update(offset for offset, opens in zip(offsets, said.boundary[ours].tolist(), strict=True) if opens)


def _pieces(data: bytes, length: int) -> list[bytes]:
    return [data[at : at + length] for at in range(0, len(data), length)]
