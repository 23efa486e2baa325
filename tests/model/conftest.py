"""Fixtures of the model's tests beside the shared ones in `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.model.hierarchy import HNet

Document = dict[str, Any]


@pytest.fixture
def document() -> Callable[..., Document]:
    """A sound two-stage configuration as official JSON; keyword arguments replace keys, None drops one."""

    def build(**changes: Any) -> Document:
        base: Document = {
            "arch_layout": ["m2", ["T1m1", ["T2"], "m1T1"], "m2"],
            "d_model": [64, 96, 128],
            "d_intermediate": [0, 128, 300],
            "vocab_size": 256,
            "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 32, "expand": 2},
            "attn_cfg": {"num_heads": [4, 4, 4], "rotary_emb_dim": [16, 16, 16], "window_size": [15, 15, -1]},
            "tie_embeddings": False,
        }
        merged = {**base, **changes}
        return {key: value for key, value in merged.items() if value is not None}

    return build


@dataclass
class Heard:
    """What the runtime said of one row's bytes so far: logits of each, and each routed stage's verdicts."""

    num_routed: int
    _logits: list[Tensor] = field(default_factory=list)
    verdicts: list[list[tuple[int, float, bool]]] = field(default_factory=list)  # (byte offset, p, boundary)

    def __post_init__(self) -> None:
        self.verdicts = [[] for _ in range(self.num_routed)]

    @property
    def logits(self) -> Tensor:
        """[T, V]"""
        return torch.cat(self._logits)

    def offsets(self, stage: int) -> list[int]:
        return [offset for offset, _, _ in self.verdicts[stage]]

    def probabilities(self, stage: int) -> Tensor:
        return torch.tensor([p for _, p, _ in self.verdicts[stage]])

    def boundaries(self, stage: int) -> Tensor:
        return torch.tensor([boundary for _, _, boundary in self.verdicts[stage]], dtype=torch.bool)

    def add(self, logits: Tensor, verdicts: list[list[tuple[int, float, bool]]]) -> None:
        self._logits.append(logits)
        for kept, new in zip(self.verdicts, verdicts, strict=True):
            kept += new


class Rows:
    """The arenas of one model: opens rows, feeds them bytes in any company, and keeps what each heard."""

    def __init__(self, model: HNet, num_rows: int = 16, max_positions: int = 512) -> None:
        self.model, self.num_rows, self.max_positions = model, num_rows, max_positions
        self.state = model.new_state(
            num_rows=num_rows, kv_positions=num_rows * max_positions, max_positions=max_positions
        )
        self.heard: dict[int, Heard] = {}

    def open(self, row: int) -> None:
        """A new sequence in the row, as the engine does it: pages, then reset."""
        for pool in self.state.page_pools:
            pool.reserve(row, self.max_positions)
        self.state.reset([row])
        self.heard[row] = Heard(self.model.config.num_routed_stages)

    def close(self, row: int) -> Heard:
        for pool in self.state.page_pools:
            pool.free(row)
        return self.heard.pop(row)

    def feed(self, pieces: Mapping[int, bytes]) -> None:
        """One forward of the rows, in the mapping's order."""
        rows, lengths = list(pieces), [len(piece) for piece in pieces.values()]
        result = self.model.run(self.state, rows, list(pieces.values()), lengths)
        for row, logits in zip(rows, torch.split(result.logits, lengths), strict=True):
            verdicts: list[list[tuple[int, float, bool]]] = [[] for _ in range(self.heard[row].num_routed)]
            for stage, said in enumerate(result.verdicts):
                own = np.flatnonzero(said.rows == row)
                verdicts[stage] = list(
                    zip(said.offsets[own].tolist(), said.p[own].tolist(), said.boundary[own].tolist(), strict=True)
                )
            self.heard[row].add(logits, verdicts)

    def run(self, row: int, data: bytes, span: int | None = None) -> Heard:
        """A whole sequence alone in the row, in pieces of `span` bytes, or in one."""
        self.open(row)
        for begin in range(0, len(data), span or len(data)):
            self.feed({row: data[begin : begin + (span or len(data))]})
        return self.close(row)


@pytest.fixture
def model_of() -> type[HNet]:
    """`model_of(config, weights)`: the runtime's model."""
    return HNet


@pytest.fixture
def rows_of() -> type[Rows]:
    """`rows_of(model, num_rows=16, max_positions=512)`: arenas whose rows can be fed and listened to."""
    return Rows


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
