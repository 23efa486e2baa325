"""Where prefill kernels find their positions: a `Spans` as tensors on the device, made once a stage and forward.

Knows rows, positions and tiles of them; nothing of what a kernel does there.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.ops.spans import Ints, Spans

TILE = 64
"""Positions of one tile. Tiles begin at absolute multiples of it, whatever position a span begins at: a prompt that is
cut at such multiples runs the very tiles it would run in one piece, and the numbers are the same bit for bit. Pages
and attention's blocks of keys have the same size and borders."""


@dataclass(frozen=True)
class PackedSpans:
    """What kernels read of `Spans`; all tensors are int64 and views of one, so that one copy brings them over.

    rows, starts, lengths: [R] of each span; offsets: [longest + 1] where each time's positions begin.
    span_of, time_of: [T] of each packed position.
    tile_span, tile_begin, tile_size: [tiles] the span each tile belongs to, the time within it at which the tile
    begins, and its positions (1 … TILE), span after span and in order of time. first_tile: [R + 1].
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    span_of: Tensor
    time_of: Tensor
    tile_span: Tensor
    tile_begin: Tensor
    tile_size: Tensor
    first_tile: Tensor

    @property
    def total(self) -> int:
        return self.span_of.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.tile_span.shape[0]

    def __len__(self) -> int:
        return self.rows.shape[0]

    @classmethod
    def of(cls, spans: Spans) -> PackedSpans:
        """The tensors of `spans` on its device; made at the first call for it, kept as long as it lives."""
        found = _MADE.get(spans)
        if found is None:
            found = _MADE[spans] = cls(*_on_device(_parts(spans), spans.device))
        return found


_MADE: WeakKeyDictionary[Spans, PackedSpans] = WeakKeyDictionary()


def _parts(spans: Spans) -> list[Ints]:
    first_block = spans.starts // TILE
    blocks = (spans.starts + spans.lengths - 1) // TILE - first_block + 1  # [R] tiles of each span
    first_tile = np.concatenate([[0], np.cumsum(blocks)])
    span = np.repeat(np.arange(len(spans)), blocks)
    block = first_block[span] + np.arange(len(span)) - first_tile[span]
    begin = np.maximum(block * TILE - spans.starts[span], 0)
    end = np.minimum((block + 1) * TILE - spans.starts[span], spans.lengths[span])
    return [
        *(spans.rows, spans.starts, spans.lengths, spans.offsets),
        *(spans.span_of, spans.time_of, span, begin, end - begin, first_tile),
    ]


def _on_device(parts: list[Ints], device: torch.device) -> list[Tensor]:
    """The parts as views of one tensor, each beginning at a multiple of 16 bytes: Triton compiles a kernel anew for
    pointers that do not."""
    sizes = [len(part) + len(part) % 2 for part in parts]
    host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    for target, part in zip(torch.split(host, sizes), parts, strict=True):
        target[: len(part)] = torch.from_numpy(np.ascontiguousarray(part))
    there = torch.split(host.to(device, non_blocking=True), sizes)
    return [view[: len(part)] for view, part in zip(there, parts, strict=True)]


def position_stride(tensor: Tensor) -> int:
    """Numbers from one position to the next of a [T, …] view; ValueError unless those of a position are adjacent."""
    if not tensor[0].is_contiguous():
        raise ValueError(f"the numbers of a position must be adjacent; strides are {tensor.stride()}")
    return tensor.stride(0)
