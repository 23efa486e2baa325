"""Fixtures of the ops' tests: sequences of several rows, packed into spans and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hnet_runtime.ops.spans import Spans

CPU = torch.device("cpu")


@dataclass
class Sequences:
    """What some rows of an arena hold, position by position, and how far each has been run.

    tensors: row → tensors [L, …], each op's per-position inputs in the op's order.
    """

    tensors: Mapping[int, tuple[Tensor, ...]]
    position: dict[int, int] = field(default_factory=dict)

    def run(self, op: Callable[..., Tensor], ticks: list[dict[int, int]]) -> dict[int, Tensor]:
        """Runs `op(spans, *packed tensors) → [T, …]` over ticks of {row: positions}; returns each row's outputs."""
        self.position = dict.fromkeys(self.tensors, 0)
        outputs: dict[int, list[Tensor]] = {row: [] for row in self.tensors}
        for tick in ticks:
            rows = list(tick)
            spans, _ = Spans.of(rows, [self.position[row] for row in rows], list(tick.values()), CPU)
            where = [
                (int(row), int(position))
                for row, position in zip(spans.rows[spans.span_of], spans.position_of, strict=True)
            ]
            count = len(next(iter(self.tensors.values())))
            packed = [torch.stack([self.tensors[row][i][position] for row, position in where]) for i in range(count)]
            found = op(spans, *packed)
            assert len(found) == spans.total
            for (row, position), value in zip(where, found, strict=True):
                assert position == self.position[row]
                outputs[row].append(value)
                self.position[row] += 1
        return {row: torch.stack(values) for row, values in outputs.items() if values}


@pytest.fixture
def sequences() -> type[Sequences]:
    return Sequences


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """`noise(*shape, seed=0)`: normal numbers, fp32."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cuts() -> Callable[[int], list[list[dict[int, int]]]]:
    """`cuts(L)`: ways to run row 2's L positions, alone and beside rows 1 and 3 (of L positions as well)."""

    def ways(length: int) -> list[list[dict[int, int]]]:
        def alone(size: int) -> list[dict[int, int]]:
            return [{2: min(size, length - begin)} for begin in range(0, length, size)]

        third = length // 3
        crowd = [{1: 1, 2: third, 3: 2}, *[{3: 1, 2: 1, 1: 1}] * 3, {2: length - third - 4, 1: third}, {2: 1, 3: third}]
        return [alone(length), alone(1), alone(7), alone(64), crowd]

    return ways
