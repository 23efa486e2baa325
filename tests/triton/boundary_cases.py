"""The Triton ops around a step's boundaries against their torch twins, in the interpreter: bit for bit, since they move
numbers and compute none; draws but for the order of sums in fp64.

Not collected by itself, as `step_cases.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.ops import boundary, drawing, entry, places, sampling
from hnet_runtime.ops.drawing import NUMBERS
from hnet_runtime.ops.entry import NO_BYTE
from hnet_runtime.ops.triton import boundary as triton_boundary
from hnet_runtime.ops.triton import drawing as triton_drawing
from hnet_runtime.ops.triton import entry as triton_entry
from hnet_runtime.ops.triton import places as triton_places
from hnet_runtime.state.rows import PagePool
from tests.triton.closeness import noise

NUM_ROWS = 9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
PADS = pytest.mark.parametrize("pad", [None, 5])


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", ["pages", "ring", "nowhere"])
@pytest.mark.parametrize("op", ["next_places", "last_places"])
def test_places(op, kind):
    pool = PagePool(NUM_ROWS, 64, 600)
    for row in (3, 7):
        pool.reserve(row, 600)
    table = torch.from_numpy(pool.table) if kind == "pages" else None
    for rows, at in (([7, 3, 0, 0], [63, 599]), ([3], [0]), ([7] + [0] * 200, [64])):
        ours = torch.full((NUM_ROWS,), 5)
        ours[0], ours[rows[: len(at)]] = 0, torch.tensor(at)
        theirs = ours.clone()
        arguments = table, 70 if kind == "ring" else None
        found = getattr(triton_places, op)(torch.tensor(rows), ours, *arguments)
        for one, other in zip(found, getattr(places, op)(torch.tensor(rows), theirs, *arguments), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(ours, theirs)


@DTYPES
@pytest.mark.parametrize("bucket", [1, 2, 7, 40])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@PADS
def test_descend_step(dtype, bucket, share, pad):
    p, rows, encoded = boundary_case(bucket, share, dtype)
    behind = None if pad is None else noise(pad, seed=3).to(dtype)
    ours, theirs = torch.zeros(bucket), torch.zeros(bucket)
    found = triton_boundary.descend_step(p, rows, encoded, behind, ours)
    for one, other in zip(found, boundary.descend_step(p, rows, encoded, behind, theirs), strict=True):
        same(one, other)
    same(ours, theirs)


@DTYPES
@pytest.mark.parametrize("bucket", [1, 2, 7, 40])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_park_step(dtype, bucket, share):
    p, rows, encoded = boundary_case(bucket, share, dtype)
    ours = noise(bucket + 1, 20).to(dtype), noise(bucket + 1), torch.zeros(bucket)
    theirs = tuple(each.clone() for each in ours)
    found = triton_boundary.park_step(p, rows, encoded, *ours)
    for one, other in zip(found, boundary.park_step(p, rows, encoded, *theirs), strict=True):
        same(one, other)
    for one, other, padding in zip(ours, theirs, (1, 1, 0), strict=True):
        same(one[padding:], other[padding:])


def boundary_case(bucket: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """p, ties and a row that has none among them, rows, padding behind them, and what was encoded."""
    generator = torch.Generator().manual_seed(bucket)
    p = torch.where(torch.rand(bucket, generator=generator) < share, 0.9, 0.1)
    rows = torch.randperm(bucket, generator=generator) + 1
    if bucket > 2:
        p[0], p[1], p[2] = 0.5, float("nan"), 0.50001
        rows[-2:] = 0
    return p, rows, noise(bucket, 20).to(dtype)


def test_enter_step():
    rows, data = torch.tensor([5, 1, 2, 7, 0, 0]), torch.tensor([65, -1, -1, 0, 0, 0])
    ours = torch.tensor([-1, 200, -1, 9, 9, -1, -1, 30]), torch.full((6,), 9.0)
    theirs = tuple(each.clone() for each in ours)
    for dtype, width in ((torch.float32, 20), (torch.bfloat16, 8)):
        embeddings = noise(256, width).to(dtype)
        found = triton_entry.enter_step(rows, data, ours[0], embeddings, ours[1])
        expected = entry.enter_step(rows, data, theirs[0], embeddings, theirs[1])
        for one, other in zip((*found, *ours), (*expected, *theirs), strict=True):
            same(one, other)
        assert found[0].tolist() == [5, 1 if dtype == torch.float32 else 0, 0, 7, 0, 0]


@DTYPES
@pytest.mark.parametrize("rows", [[3], [5, 1, 0, 0, 0]], ids=["one", "padded"])
@PADS
def test_resume_and_surface_step(dtype, rows, pad):
    at, parked, parked_p = torch.tensor(rows), noise(NUM_ROWS, 20).to(dtype), noise(NUM_ROWS, seed=1)
    behind = None if pad is None else noise(pad, seed=3).to(dtype)
    ours, theirs = torch.full((len(rows),), 9.0), torch.full((len(rows),), 9.0)
    same(triton_entry.resume_step(at, parked, behind, ours), entry.resume_step(at, parked, behind, theirs))
    same(ours, theirs)
    found = triton_entry.surface_step(at, parked, parked_p)
    for one, other in zip(found, entry.surface_step(at, parked, parked_p), strict=True):
        same(one, other)


def drawing_case(seed: int, count: int, coarse: bool, dtype: torch.dtype, places: bool) -> tuple[Any, ...]:
    """Arguments of draw_step: rows of all manners, two of them padding."""
    draw = np.random.default_rng(seed)
    logits = (noise(count, 300, seed=seed)[:, 20:276] * 4).to(dtype)
    given = torch.from_numpy(draw.random((count, 2, 256)) < draw.choice([0.02, 0.5, 1.0]))
    given[:, 1] = torch.from_numpy(draw.random((count, 256)) < 0.5)
    given[:, 0, 7] = True
    uniform = draw.random(count)
    uniform[:3] = 0.0, 0.5, np.nextafter(1.0, 0.0)
    numbers = torch.zeros(len(NUMBERS), count + 3, dtype=torch.float64)
    columns = [
        draw.choice([0.0, 1e-300, 0.3, 1.0, 2.0], count),
        draw.choice([1.0, 0.9, 0.5, 1e-9], count),
        draw.choice([0.0, 0.0, 0.05, 1.0], count),
        uniform,
        draw.choice([0, 1, 3, 40, 256], count),
        draw.choice([-1, 0, 1, 8], count),
        draw.choice([-1, 0, 7], count),
    ]
    numbers[:, :count] = torch.from_numpy(np.stack(columns))
    numbers[5, -5:] = 0.0  # padding's state is told: nobody knows who left row 0's
    masks = torch.from_numpy(draw.random((9 * 8, 256)) < 0.5)
    masks[:, 7] = True
    rows = torch.from_numpy(draw.permutation(count) + 1)
    rows[-2:] = 0
    at = torch.from_numpy(draw.permutation(count)) if places else None
    if at is not None:
        at[-2:] = count - 1
    following = torch.from_numpy(draw.integers(0, 9, 9 * 256))
    states, next_bytes = torch.from_numpy(draw.integers(0, 9, count + 1)), torch.full((count + 1,), 300)
    written = states, next_bytes, torch.zeros(count, 256), torch.zeros(count)
    return (logits.round() if coarse else logits), rows, at, numbers[:, :count], given, masks, following, *written


@DTYPES
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("coarse", [False, True], ids=["logits", "ties"])
def test_draw_step(seed, coarse, dtype):
    ours, theirs = (drawing_case(seed, 16, coarse, dtype, places=seed % 2 == 1) for _ in range(2))
    if seed == 3:
        for arguments in (ours, theirs):
            arguments[0][0, 3], arguments[0][2, 255], arguments[0][5, 0] = float("nan"), float("inf"), float("-inf")
    triton_drawing.draw_step(*ours)
    drawing.draw_step(*theirs)
    for one, other in zip(ours[7:9], theirs[7:9], strict=True):
        same(one[1:], other[1:])
    same(ours[9], theirs[9])
    same(ours[10], theirs[10])
    assert ((theirs[10] == sampling.NOT_FINITE).nonzero().flatten().tolist() == [0, 2, 5]) == (seed == 3)
    kept = ours[8][ours[1][:-2]]
    assert (kept == NO_BYTE).any()
    assert ((kept >= 0) & (kept < 256)).any()
