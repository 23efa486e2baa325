"""Matrix products in tiles of a fixed number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.ops import gradients

ROW_TILE = 16
"""Rows of one matrix product on CPU. A library picks its kernel, and with it the order of
summation, by the number of rows: fp32 results differ between 1 row and 16, but not
between the places a row can take in a tile of 16."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b.

    x: [T, K], weight: [N, K], bias: [N] → [T, N] in x's dtype, which must be the weight's. Where a gradient is asked
    for it is one product of all rows.
    """
    if x.device.type != "cpu" or gradients.asked_for(x, weight):
        return F.linear(x, weight, bias)
    x = x.contiguous()  # by strides and alignment, too, a library picks its kernel
    rows = x.shape[0]
    transposed = weight.t()
    if rows == ROW_TILE:
        y = torch.mm(x, transposed)
    elif rows < ROW_TILE:
        y = torch.mm(_padded(x), transposed)[:rows]
    else:
        y = x.new_empty(rows, weight.shape[0])
        whole = rows - rows % ROW_TILE
        for start in range(0, whole, ROW_TILE):
            torch.mm(x[start : start + ROW_TILE], transposed, out=y[start : start + ROW_TILE])
        if whole < rows:
            y[whole:] = torch.mm(_padded(x[whole:]), transposed)[: rows - whole]
    return y if bias is None else y + bias


def _padded(x: Tensor) -> Tensor:
    tile = x.new_zeros(ROW_TILE, x.shape[1])
    tile[: x.shape[0]] = x
    return tile
