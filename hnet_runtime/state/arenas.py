"""The memory of all rows: one tensor per kind and layer, indexed by row, updated in place.

Knows the shapes a model's state has; nothing of requests, and not when a row is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import ModelConfig, StackConfig, StageConfig
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots, StagePages, pages_for


@dataclass(frozen=True)
class Mamba2State:
    """conv: [rows, K − 1, E] last inputs of the convolution; ssm: [rows, H, P, N] fp32."""

    conv: Tensor
    ssm: Tensor

    def reset(self, rows: Tensor) -> None:
        self.conv.index_fill_(0, rows, 0.0)
        self.ssm.index_fill_(0, rows, 0.0)


@dataclass(frozen=True)
class AttentionState:
    """k, v: [slots, H, P]; which slots hold a row's positions, its stage's pages or ring say.

    Nothing to reset: a row's position count says which slots are its own.
    """

    k: Tensor
    v: Tensor

    def reset(self, rows: Tensor) -> None:
        del rows


LayerState = Mamba2State | AttentionState


@dataclass(frozen=True)
class SavedRow:
    """A copy of what is a row's own in all arenas, and its position counts: all that a row needs to go on from there,
    but the pages of full-attention stages. data: [bytes] uint8, on the arenas' device."""

    data: Tensor
    positions: tuple[int, ...]
    parked: bool  # what a row waits with is in it, too

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class SwappedRow:
    """A row in host memory: `saved` with what it waits with, and the contents of its pages: [pages, bytes] of each
    layer's keys and values, stage by stage."""

    saved: SavedRow
    pages: tuple[Tensor, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        return self.saved.positions


@dataclass(frozen=True)
class StageState:
    """State of one stage. `router` [rows, D], `ema` [rows, D] (fp32), `parked` [rows, D] and `parked_p` [rows] (fp32)
    are None in the main network. The last two are of rows that wait for the next stage: what their router saw, and its
    p; nobody else's are ever read."""

    stacks: dict[str, tuple[LayerState, ...]]
    positions: NDArray[np.int64]  # [rows] positions of this stage that each row has run
    slots: PagePool | RingSlots | None  # where attention layers keep keys
    router: Tensor | None
    ema: Tensor | None
    parked: Tensor | None
    parked_p: Tensor | None

    def tensors(self) -> Iterator[Tensor]:
        for layers in self.stacks.values():
            for layer in layers:
                yield from (layer.conv, layer.ssm) if isinstance(layer, Mamba2State) else (layer.k, layer.v)
        yield from (each for each in (self.router, self.ema, self.parked, self.parked_p) if each is not None)


class ModelState:
    """Arenas for `num_rows` rows besides the padding row.

    kv_positions: KV capacity, in positions, of each full-attention stage together.
    max_positions: most positions one row may have in any stage (bytes it may read and write).
    dtype: of the activations that are carried; kv_dtype: of keys and values, where that is another.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        kv_positions: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.num_rows = num_rows + 1
        self.max_positions = max_positions
        self.device = device
        self._dtype, self._kv_dtype = dtype, kv_dtype or dtype
        self.stages = tuple(
            self._stage(stage, kv_positions=kv_positions, max_positions=max_positions) for stage in config.stages
        )
        self._bytes_by_row()

    def _stage(self, stage: StageConfig, *, kv_positions: int, max_positions: int) -> StageState:
        slots: PagePool | RingSlots | None = None
        num_slots = 0
        if stage.attention is not None:
            window = stage.attention.window
            if 0 <= window < max_positions - 1:
                slots = RingSlots(window + 1)
                num_slots = self.num_rows * slots.capacity
            else:
                slots = PagePool(self.num_rows, pages_for(kv_positions), max_positions)
                num_slots = (slots.num_pages + 1) * PAGE

        def layers(stack: StackConfig) -> tuple[LayerState, ...]:
            return tuple(
                self._mamba2(stage) if layer.mixer == "mamba2" else self._attention(stage, num_slots)
                for layer in stack.layers
            )

        routed = not stage.is_main
        return StageState(
            stacks={stack.name: layers(stack) for stack in stage.stacks},
            positions=np.zeros(self.num_rows, dtype=np.int64),
            slots=slots,
            router=self._zeros(self.num_rows, stage.d_model, dtype=self._dtype) if routed else None,
            ema=self._zeros(self.num_rows, stage.d_model, dtype=torch.float32) if routed else None,
            parked=self._zeros(self.num_rows, stage.d_model, dtype=self._dtype) if routed else None,
            parked_p=self._zeros(self.num_rows, dtype=torch.float32) if routed else None,
        )

    def _mamba2(self, stage: StageConfig) -> Mamba2State:
        assert stage.mamba2 is not None
        ssm = stage.mamba2
        return Mamba2State(
            conv=self._zeros(self.num_rows, ssm.d_conv - 1, ssm.conv_channels, dtype=self._dtype),
            ssm=self._zeros(self.num_rows, ssm.num_heads, ssm.head_dim, ssm.d_state, dtype=torch.float32),
        )

    def _attention(self, stage: StageConfig, num_slots: int) -> AttentionState:
        assert stage.attention is not None
        shape = (num_slots, stage.attention.num_heads, stage.attention.head_dim)
        return AttentionState(k=self._zeros(*shape, dtype=self._kv_dtype), v=self._zeros(*shape, dtype=self._kv_dtype))

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        # The system hands out zeroed memory when it is first written: an arena that is never used costs address
        # space only. torch.zeros would write all of it.
        size = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for stage in self.stages for tensor in stage.tensors())

    @property
    def page_pools(self) -> tuple[PagePool, ...]:
        return tuple(pages.pool for pages in self.pages)

    @property
    def pages(self) -> tuple[StagePages, ...]:
        """Of each stage that keeps pages: which, and how far its rows are."""
        return tuple(
            StagePages(index, stage.slots, stage.positions)
            for index, stage in enumerate(self.stages)
            if isinstance(stage.slots, PagePool)
        )

    @property
    def saved_bytes(self) -> int:
        """Bytes that `save` copies of a row whose rings are full, without what it waits with."""
        rings = sum(part.view.shape[1] * part.view.shape[2] for part in self._rings)
        return rings + sum(view.shape[1] for view in self._own)

    def reset(self, rows: Sequence[int]) -> None:
        """Makes rows as if they had never run."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        for stage in self.stages:
            stage.positions[list(rows)] = 0
            for layers in stage.stacks.values():
                for layer in layers:
                    layer.reset(index)
            if stage.router is not None and stage.ema is not None:
                stage.router.index_fill_(0, index, 0.0)
                stage.ema.index_fill_(0, index, 0.0)

    # ── a row's state taken out and put back ───────────────────────────────────────────────────────

    def save(self, row: int, *, parked: bool = False) -> SavedRow:
        """A copy of a row at rest; with what it waits with at a boundary where `parked`."""
        positions = tuple(int(stage.positions[row]) for stage in self.stages)
        parts = [view[row] for view in self._own]
        parts += [view[row] for view in self._parked] if parked else []
        parts += [ring.view[row, : ring.used(positions)].reshape(-1) for ring in self._rings]
        # A model of full attention alone keeps nothing but pages.
        nothing = torch.empty(0, dtype=torch.uint8, device=self.device)
        return SavedRow(torch.cat(parts) if parts else nothing, positions, parked)

    def load(self, row: int, saved: SavedRow) -> None:
        """Makes a row what `save` copied, whichever row that was; its pages are its caller's business."""
        views = [*self._own, *(self._parked if saved.parked else ())]
        targets = [view[row] for view in views]
        targets += [ring.view[row, : ring.used(saved.positions)].reshape(-1) for ring in self._rings]
        for target, part in zip(targets, torch.split(saved.data, [each.numel() for each in targets]), strict=True):
            target.copy_(part)
        for stage, count in zip(self.stages, saved.positions, strict=True):
            stage.positions[row] = count

    def copy_page(self, stage: int, source: int, target: int) -> None:
        """Copies the keys and values of one page of a stage onto another."""
        for view in self._paged[stage]:
            view[target] = view[source]

    def swap_out(self, row: int) -> SwappedRow:
        """A row with its pages, in host memory."""
        saved = self.save(row, parked=True)
        contents = [
            view[self._pages_of(pages.pool, row, saved.positions[pages.stage])].cpu()
            for pages in self.pages
            for view in self._paged[pages.stage]
        ]
        return SwappedRow(SavedRow(saved.data.cpu(), saved.positions, saved.parked), tuple(contents))

    def swap_in(self, row: int, swapped: SwappedRow) -> None:
        """Puts a row back, on any row that has pages for its positions."""
        self.load(row, swapped.saved)
        contents = iter(swapped.pages)
        for pages in self.pages:
            owned = self._pages_of(pages.pool, row, swapped.positions[pages.stage])
            for view in self._paged[pages.stage]:
                view[owned] = next(contents).to(self.device)

    def _pages_of(self, pool: PagePool, row: int, positions: int) -> Tensor:
        return torch.from_numpy(pool.table[row, : pages_for(positions)].copy()).to(self.device)

    def _bytes_by_row(self) -> None:
        """Views of all arenas as bytes of a row, a ring's slot, or a page."""
        self._own: list[Tensor] = []  # each [rows, bytes]
        self._parked: list[Tensor] = []
        self._rings: list[_Ring] = []
        self._paged: dict[int, list[Tensor]] = {}  # each [pages, bytes]
        for index, stage in enumerate(self.stages):
            layers = [layer for stack in stage.stacks.values() for layer in stack]
            for layer in layers:
                if isinstance(layer, Mamba2State):
                    self._own += [_as_bytes(layer.conv), _as_bytes(layer.ssm)]
            self._own += [_as_bytes(each) for each in (stage.router, stage.ema) if each is not None]
            self._parked += [_as_bytes(each) for each in (stage.parked, stage.parked_p) if each is not None]
            kept = [each for layer in layers if isinstance(layer, AttentionState) for each in (layer.k, layer.v)]
            if isinstance(stage.slots, RingSlots):
                capacity = stage.slots.capacity
                self._rings += [_Ring(index, _as_bytes(each).view(self.num_rows, capacity, -1)) for each in kept]
            elif isinstance(stage.slots, PagePool):
                num_pages = stage.slots.num_pages + 1
                self._paged[index] = [_as_bytes(each).view(num_pages, -1) for each in kept]


@dataclass(frozen=True)
class _Ring:
    """view: [rows, capacity, bytes of a position]."""

    stage: int
    view: Tensor

    def used(self, positions: tuple[int, ...]) -> int:
        """Slots that a row with so many positions has written."""
        return min(positions[self.stage], self.view.shape[1])


def _as_bytes(tensor: Tensor) -> Tensor:
    """[n, …] → [n, bytes], the same memory."""
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def kv_bytes_per_position(config: ModelConfig, dtype: torch.dtype, max_positions: int) -> int:
    """Bytes that one position takes in all stages that keep pages, were every byte a chunk."""
    total = 0
    for stage in config.stages:
        layers = sum(layer.mixer == "attention" for stack in stage.stacks for layer in stack.layers)
        if stage.attention is not None and not 0 <= stage.attention.window < max_positions - 1:
            total += layers * 2 * stage.d_model * dtype.itemsize
    return total


def state_bytes_per_row(config: ModelConfig, dtype: torch.dtype, max_positions: int) -> int:
    """Bytes of fixed-size state (convolution, SSM, rings, router, EMA) one row takes."""
    total = 0
    for stage in config.stages:
        for stack in stage.stacks:
            for layer in stack.layers:
                if layer.mixer == "mamba2":
                    assert stage.mamba2 is not None
                    ssm = stage.mamba2
                    total += (ssm.d_conv - 1) * ssm.conv_channels * dtype.itemsize + ssm.d_inner * ssm.d_state * 4
                elif stage.attention is not None and 0 <= stage.attention.window < max_positions - 1:
                    total += 2 * (stage.attention.window + 1) * stage.d_model * dtype.itemsize
        if not stage.is_main:
            total += stage.d_model * (2 * dtype.itemsize + 4) + 4
    return total
