"""A small step in the manner of the real one, and what can be wrong with such a step, one defect in each form of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ROWS, WIDTH, MOST = 8, 6, 8
TURN_ROWS = ((3, 1, 5), (1, 5), (5, 3, 7, 2), (7,))


class ToyStep:
    """Rows gather their memory, mix it with an input and their position, and write it back; a row whose value is large
    counts a chunk."""

    num_rows = ROWS

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.weight, self.table = drawn(WIDTH, WIDTH), drawn(256, WIDTH)
        self.memory = torch.zeros(ROWS, WIDTH, device=device)
        self.positions = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.chunks = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.other = torch.zeros(ROWS, WIDTH, device=device)
        self.rows = torch.zeros(MOST, dtype=torch.int64, device=device)
        self.data = torch.zeros(MOST, dtype=torch.int64, device=device)
        self.out = torch.zeros(MOST, WIDTH, device=device)
        self.host_position, self.host_scale = 0, np.ones(WIDTH, dtype=np.float32)
        self.constants = [self.weight, self.table]
        self.state: Mapping[str, Tensor] = {
            "memory": self.memory,
            "positions": self.positions,
            "chunks": self.chunks,
            "other": self.other,
        }
        self.scratch = [self.rows, self.data, self.out]

    def rows_of(self, turn: int) -> tuple[int, ...]:
        return TURN_ROWS[turn % len(TURN_ROWS)]

    def fill(self, turn: int, bucket: int) -> None:
        rows = self.rows_of(turn)
        padded = [*rows, *[0] * (bucket - len(rows))]
        self.rows[:bucket] = torch.tensor(padded)
        self.data[:bucket] = torch.tensor([(37 * turn + row) % 256 if row else 0 for row in padded])
        self.host_position = turn
        self.host_scale[:] = 1.0 + turn

    def run(self, bucket: int) -> None:
        rows = self.rows[:bucket]
        x = self.mixed(rows, self.table.index_select(0, self.data[:bucket]))
        position = self.positions.index_select(0, rows)
        x = torch.sin(torch.mm(x, self.weight) + self.position(position))
        self.keep(rows, x)
        self.positions.index_copy_(0, rows, position + (rows > 0))
        self.count(rows, x)
        self.give(bucket, x)

    def read(self, turn: int) -> Mapping[str, Tensor]:
        return {"out": self.out[: len(self.rows_of(turn))].clone()}

    # What the defects change:

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return x + self.memory.index_select(0, rows)

    def position(self, position: Tensor) -> Tensor:
        return position.float().unsqueeze(-1) * 0.1

    def keep(self, rows: Tensor, x: Tensor) -> None:
        self.memory.index_copy_(0, rows, x)

    def count(self, rows: Tensor, x: Tensor) -> None:
        opens = (x.sum(-1) > 0) & (rows > 0)
        self.chunks.index_copy_(0, rows, self.chunks.index_select(0, rows) + opens)

    def give(self, bucket: int, x: Tensor) -> None:
        self.out[:bucket].copy_(x)


class BakedPosition(ToyStep):
    """The host's number of the moment of capture."""

    def position(self, position: Tensor) -> Tensor:
        return torch.zeros_like(position, dtype=torch.float32).unsqueeze(-1) + self.host_position * 0.1


class BakedBranch(ToyStep):
    """A way taken at capture is taken for ever."""

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return super().mixed(rows, x) if self.host_position % 2 == 0 else x


class ReboundState(ToyStep):
    """The name has new memory; a replay writes the first one's."""

    def keep(self, rows: Tensor, x: Tensor) -> None:
        self.memory = self.memory.index_copy(0, rows, x)


class EscapingOutput(ToyStep):
    """The output is memory of the run, which graphs share."""

    def give(self, bucket: int, x: Tensor) -> None:
        self.out = x


class HiddenSync(ToyStep):
    def count(self, rows: Tensor, x: Tensor) -> None:
        if x.sum().item() > -1e9:
            super().count(rows, x)


class HiddenBool(ToyStep):
    def count(self, rows: Tensor, x: Tensor) -> None:
        if (x == x).all():
            super().count(rows, x)


class CopyToHost(ToyStep):
    def count(self, rows: Tensor, x: Tensor) -> None:
        super().count(rows, x.cpu().to(rows.device))


class BooleanIndexing(ToyStep):
    def count(self, rows: Tensor, x: Tensor) -> None:
        self.chunks[rows[x.sum(-1) > 0]] += 1


class BooleanAssignment(ToyStep):
    def keep(self, rows: Tensor, x: Tensor) -> None:
        x[x.sum(-1) > 0] = x[:1]
        super().keep(rows, x)


class Nonzero(ToyStep):
    def count(self, rows: Tensor, x: Tensor) -> None:
        self.chunks[rows[torch.nonzero(x.sum(-1) > 0)[:, 0]]] += 1


class HostTensor(ToyStep):
    """An array of the host's becomes a constant of the capture."""

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return super().mixed(rows, x) * torch.from_numpy(self.host_scale)


class HostIndex(ToyStep):
    def give(self, bucket: int, x: Tensor) -> None:
        super().give(bucket, x[torch.arange(bucket - 1, -1, -1)].flip(0))


class HostScalar(ToyStep):
    """A 0-dim tensor of the host's may meet any device, and its value is a part of the launch."""

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return super().mixed(rows, x) * torch.tensor(1.0 + self.host_position)


class NewConstant(ToyStep):
    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return super().mixed(rows, x) * torch.tensor([1.0 + self.host_position], device=x.device)


class LeakThroughMean(ToyStep):
    """A sum over the batch's rows sees the padding's."""

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        x = super().mixed(rows, x)
        return x - x.mean(0, keepdim=True)


class LeakIntoLastRow(ToyStep):
    """Padding written as the arena's last row."""

    def keep(self, rows: Tensor, x: Tensor) -> None:
        self.memory.index_copy_(0, torch.where(rows > 0, rows, ROWS - 1), x)


class PaddingIsFirstRow(ToyStep):
    """Padding that repeats a real row steps it once more for each repetition."""

    def count(self, rows: Tensor, x: Tensor) -> None:
        opens = (x.sum(-1) > 0).long()
        self.chunks.scatter_add_(0, torch.where(rows > 0, rows, rows[:1].expand(len(rows))), opens)


class UndeclaredWrite(ToyStep):
    """Weights that a step changes."""

    def keep(self, rows: Tensor, x: Tensor) -> None:
        super().keep(rows, x)
        self.weight.mul_(0.999)


class StrayState(ToyStep):
    """State that is not this step's to write."""

    def keep(self, rows: Tensor, x: Tensor) -> None:
        super().keep(rows, x)
        self.other.index_copy_(0, rows, x)


class ForgottenState(ToyStep):
    """State that is never written."""

    def count(self, rows: Tensor, x: Tensor) -> None:
        del rows, x


class RandomNumbers(ToyStep):
    """A generator on the device is state that nobody keeps."""

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return super().mixed(rows, x) + torch.rand_like(x)


class HiddenAlgebra(ToyStep):
    """An operation that waits for the device inside, and looks as harmless as a product."""

    def mixed(self, rows: Tensor, x: Tensor) -> Tensor:
        return super().mixed(rows, x) @ torch.linalg.inv(self.weight) @ self.weight
