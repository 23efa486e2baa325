"""Prefill kernels: in the interpreter against their twins, and what needs no kernel to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hnet_runtime.ops.attention import BLOCK
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton.packed_spans import TILE, PackedSpans, position_stride
from hnet_runtime.state.rows import PAGE

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.timeout(600)
def test_every_prefill_kernel_is_its_twin_over_spans_and_dtypes():
    """A process is in one of Triton's modes: the interpreter's cases run in their own, one after the other."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("prefill_cases.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("passed") > 50


def test_tiles_pages_and_blocks_of_keys_have_the_same_borders():
    assert TILE == PAGE == BLOCK


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0], [1]), ([0], [64]), ([0], [65]), ([63], [1]), ([63], [2]), ([64, 0, 10], [64, 200, 1]), ([130, 1], [7, 190])],
)
def test_tiles_cover_every_position_once_and_end_at_multiples_of_64(starts, lengths):
    spans, _ = Spans.of(range(1, len(starts) + 1), starts, lengths, CPU)
    packed = PackedSpans.of(spans)
    found = []
    for span in range(len(spans)):
        tiles = range(int(packed.first_tile[span]), int(packed.first_tile[span + 1]))
        assert (packed.tile_span[list(tiles)] == span).all()
        for tile in tiles:
            begin, size = int(packed.tile_begin[tile]), int(packed.tile_size[tile])
            first, last = int(spans.starts[span]) + begin, int(spans.starts[span]) + begin + size - 1
            assert first // TILE == last // TILE
            found += [(span, time) for time in range(begin, begin + size)]
    assert found == [(span, time) for span, length in enumerate(spans.lengths) for time in range(length)]
    assert packed.num_tiles == packed.first_tile[-1]


def test_packed_spans_say_what_spans_say_and_are_made_once():
    spans, _ = Spans.of([4, 2, 7], [0, 5, 64], [3, 70, 3], CPU)
    packed = PackedSpans.of(spans)
    assert PackedSpans.of(spans) is packed
    assert len(packed) == 3
    assert packed.total == spans.total
    for name in ("rows", "starts", "lengths", "offsets", "span_of", "time_of"):
        tensor = getattr(packed, name)
        assert np.array_equal(tensor.numpy(), getattr(spans, name))
        assert tensor.dtype == torch.int64
        assert (tensor.data_ptr() - packed.rows.data_ptr()) % 16 == 0  # what Triton's vector loads ask of pointers


def test_numbers_of_a_position_that_are_apart_are_refused():
    assert position_stride(torch.zeros(4, 10)[:, 2:5]) == 10
    with pytest.raises(ValueError, match="adjacent"):
        position_stride(torch.zeros(4, 10)[:, ::2])
