"""Inputs on which each op of prefill is compared with its twin: packed spans, and memory that rows carry on.

Knows shapes and signatures; not which code runs an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.gpu_doctor.closeness import close, noise
from hnet_runtime.ops.prefill import PrefillOps
from hnet_runtime.ops.rotary import rotary_table
from hnet_runtime.ops.spans import Spans
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

FP32, BF16 = torch.float32, torch.bfloat16
ROWS = 6
SPANS = {
    "one long": ([3], [0], [150]),
    "ragged": ([2, 5, 1], [0, 0, 0], [9, 70, 33]),
    "starts within tiles": ([4, 1, 2], [37, 64, 100], [60, 64, 3]),
    "lengths of 1": ([5, 1, 4], [0, 130, 63], [1, 1, 1]),
}
"""What spans there are: (rows, starts, lengths)."""
ATTENTION = {
    "pages, all": (-1, True),
    "pages, window": (70, True),
    "ring of 1": (0, False),
    "ring of 101": (100, False),
}
TICKS = (((2, 5), (70, 20)), ((5, 2, 1), (1, 1, 3)), ((2, 5, 1), (30, 75, 2)))
"""Rows and lengths of spans, tick after tick, each going on where its row stopped."""


@dataclass(frozen=True)
class PrefillCase:
    """`run` gives everything that the ops gave and left, to be compared one by one."""

    op: str
    name: str
    run: Callable[[PrefillOps, torch.device], list[Tensor]]

    def compare(self, ops: PrefillOps, twins: PrefillOps, device: torch.device, most: float) -> float:
        """Gives the largest difference; AssertionError where it is too large."""
        found, expected = self.run(ops, device), self.run(twins, device)
        return max(close(one, other, most) for one, other in zip(found, expected, strict=True))


@dataclass(frozen=True)
class Sizes:
    """scan: heads, head dim, states; conv: channels; width: of a stage; attention: heads, head dim."""

    scan: tuple[int, int, int]
    conv: int
    width: int
    attention: tuple[int, int]


SMALL = Sizes((1, 16, 16), 40, 40, (1, 16))
OFFICIAL = Sizes((32, 64, 128), 2304, 1024, (16, 64))


def prefill_cases(sizes: Sizes) -> Iterator[PrefillCase]:
    """Of every op of prefill."""
    for dtype in (FP32, BF16):
        short = str(dtype).removeprefix("torch.")
        for name in SPANS:
            yield PrefillCase("selective_scan", f"{name} {short}", partial(_scan, name, sizes.scan, dtype))
            yield PrefillCase("causal_conv", f"{name} {short}", partial(_conv, name, sizes.conv, dtype))
            yield PrefillCase("smooth", f"{name} {short}", partial(_smooth, name, sizes.width, dtype))
        heads, head_dim = sizes.attention
        yield PrefillCase("rotate", short, partial(_rotate, heads, head_dim, dtype))
        for name, (window, paged) in ATTENTION.items():
            run = partial(_attend, window, paged, heads, head_dim, dtype)
            yield PrefillCase("attend", f"{name} {short}", run)


def _scan(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, ops: PrefillOps, device: torch.device
) -> list[Tensor]:
    spans = Spans.of(*SPANS[name], device)[0]
    heads, channels, states = shape
    wide = noise(spans.total, heads * channels + 2 * states, seed=1).to(device, dtype)
    x, b, c = torch.split(wide, [heads * channels, states, states], dim=-1)
    dt = torch.nn.functional.softplus(noise(spans.total, heads, seed=2) * 2).to(device)
    a, d = -torch.exp(noise(heads, seed=3) * 1.5).to(device), noise(heads, seed=4).to(device)
    state = noise(ROWS, *shape, seed=5).to(device)
    y = ops.selective_scan(x.view(spans.total, heads, channels), dt, a, b, c, d, state, spans, dtype)
    return [y, state]


def _conv(name: str, channels: int, dtype: torch.dtype, ops: PrefillOps, device: torch.device) -> list[Tensor]:
    spans = Spans.of(*SPANS[name], device)[0]
    x = noise(spans.total, channels + 16, seed=1).to(device, dtype)[:, 8 : 8 + channels]
    state = noise(ROWS, 3, channels, seed=2).to(device, dtype)
    weight, bias = noise(4, channels, seed=3).to(device), noise(channels, seed=4).to(device)
    return [ops.causal_conv(x, state, spans, weight, bias, dtype), state]


def _smooth(name: str, width: int, dtype: torch.dtype, ops: PrefillOps, device: torch.device) -> list[Tensor]:
    spans = Spans.of(*SPANS[name], device)[0]
    p = torch.rand(spans.total, generator=torch.Generator().manual_seed(2))
    p[::3], p[1::5] = 1.0, 0.0
    z, memory = noise(spans.total, width + 5, seed=1).to(device, dtype), noise(ROWS, width, seed=3).to(device)
    return [ops.smooth(z[:, :width], p.to(device), memory, spans), memory]


def _rotate(heads: int, head_dim: int, dtype: torch.dtype, ops: PrefillOps, device: torch.device) -> list[Tensor]:
    qkv = noise(12, 3, heads, head_dim, seed=1).to(device, dtype)
    return [ops.rotate(qkv[:, 1], rotary_table(torch.arange(12, device=device) * 97, head_dim // 2))]


def _attend(
    window: int,
    paged: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    ops: PrefillOps,
    device: torch.device,
) -> list[Tensor]:
    table: Any = None
    capacity = None
    slots: PagePool | RingSlots
    if paged:
        slots = PagePool(ROWS, 4 * ROWS, 4 * PAGE)
        for row in range(1, ROWS):
            slots.reserve(row, 4 * PAGE)
        table, count = slots.table, (slots.num_pages + 1) * PAGE
    else:
        slots = RingSlots(window + 1)
        capacity, count = slots.capacity, ROWS * slots.capacity
    # What nobody has written yet is not finite: no query may take it up.
    k_store, v_store = (torch.full((count, heads, head_dim), torch.nan).to(device, dtype) for _ in range(2))
    position = np.zeros(ROWS, dtype=np.int64)
    outs = []
    for number, (rows, lengths) in enumerate(TICKS):
        spans = Spans.of(list(rows), position[list(rows)].tolist(), list(lengths), device)[0]
        position[list(rows)] += lengths
        q, k, v = noise(spans.total, 3, heads, head_dim, seed=number).to(device, dtype).unbind(1)
        keys = ops.keys(spans, window, slots.slots, table, capacity)
        outs.append(ops.attend(q * 2, k, v, k_store, v_store, keys))
    return [*outs, k_store, v_store]
