"""What is asked of every captured step, in the order in which a defect is cheapest to find.

1. On fake CUDA tensors it calls nothing that a graph cannot hold (`allow_list`).
2. It writes exactly the state that it says it writes.
3. Replayed, turn after turn, it does what the same step does when it is run.
4. A row's numbers and memory do not depend on how many rows of padding stand behind it, and no other row's change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu.allow_list import AllowList, storage_of
from tests.gpu.emulator import EmulatedGraphs


class Subject(Protocol):
    """A step and its memory, made anew and always alike for each proof.

    state: named memory that outlives a step, most of it [num_rows, …] with row 0 for padding; scratch: other static
    memory it writes (inputs, outputs).
    """

    constants: Sequence[Tensor]
    state: Mapping[str, Tensor]
    scratch: Sequence[Tensor]
    num_rows: int

    def rows_of(self, turn: int) -> Sequence[int]:
        """The rows that step in a turn."""

    def fill(self, turn: int, bucket: int) -> None:
        """Writes the inputs of a turn, as the host does before a replay."""

    def run(self, bucket: int) -> None:
        """The step, of static shapes."""

    def read(self, turn: int) -> Mapping[str, Tensor]:
        """What the host reads after it."""


Make = Callable[[str], Subject]


class NotProved(AssertionError):
    """A step that does not do what a captured step must."""


def _declared(subject: Subject) -> list[Tensor]:
    return [*subject.state.values(), *subject.scratch]


def prove_capturable(make: Make, mode: FakeTensorMode, bucket: int) -> AllowList:
    """Raises where the step, on fake CUDA tensors, calls what cannot be captured."""
    with mode, torch.no_grad():
        subject = make("cuda")
        watch = AllowList("cuda", subject.constants, _declared(subject))
        with watch:
            subject.run(bucket)
    return watch


def prove_state(make: Make, bucket: int, turns: int, expected: Sequence[str]) -> None:
    """Raises unless the state that turns change is exactly `expected`."""
    subject = make("cpu")
    before = {name: tensor.clone() for name, tensor in subject.state.items()}
    constants = [tensor.clone() for tensor in subject.constants]
    watch = AllowList("cpu", subject.constants, _declared(subject))
    for turn in range(turns):
        subject.fill(turn, bucket)
        with torch.no_grad(), watch:
            subject.run(bucket)
    names = {storage_of(tensor): name for name, tensor in subject.state.items()}
    written = sorted(names[storage] for storage in watch.written if storage in names)
    changed = sorted(name for name, tensor in subject.state.items() if not _same(tensor, before[name]))
    if written != sorted(expected) or changed != sorted(expected):
        raise NotProved(f"declared {sorted(expected)}, written {written}, changed {changed}")
    if not all(_same(one, other) for one, other in zip(subject.constants, constants, strict=True)):
        raise NotProved("a constant has changed")


def prove_replay(make: Make, bucket: int, turns: int) -> None:
    """Raises unless replays do what running the step does, in outputs and in memory."""
    eager, replayed = make("cpu"), make("cpu")
    graphs = EmulatedGraphs(spoils=True)
    replay = graphs.capture(lambda: replayed.run(bucket), replayed.constants, _declared(replayed))
    for turn in range(turns):
        eager.fill(turn, bucket)
        replayed.fill(turn, bucket)
        with torch.no_grad():
            eager.run(bucket)
        replay()
        graphs.spoil()
        _compare(turn, eager.read(turn), replayed.read(turn), "replayed, its outputs are others")
        _compare(turn, eager.state, replayed.state, "replayed, its memory is another")


def prove_padding(make: Make, small: int, large: int, turns: int) -> None:
    """Raises unless rows fare the same with more rows of padding behind them, and those that do not step not at all."""
    one, other = make("cpu"), make("cpu")
    for turn in range(turns):
        idle = [row for row in range(1, one.num_rows) if row not in one.rows_of(turn)]
        before = {name: tensor[idle].clone() for name, tensor in one.state.items() if len(tensor) == one.num_rows}
        for subject, bucket in ((one, small), (other, large)):
            subject.fill(turn, bucket)
            with torch.no_grad():
                subject.run(bucket)
        _compare(turn, one.read(turn), other.read(turn), "with padding, its outputs are others")
        _compare(turn, before, {name: one.state[name][idle] for name in before}, "a row that does not step is written")
        real = {name: tensor[1:] for name, tensor in one.state.items()}
        _compare(turn, real, {name: tensor[1:] for name, tensor in other.state.items()}, "padding reaches real rows")


def _compare(turn: int, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    for name, value in expected.items():
        if not _same(value, found[name]):
            raise NotProved(f"turn {turn}: {what}: {name}")


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
