"""Weights in the order the native matrix product reads them: blocks of as many outputs as a register has lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.ops.native import binding

_PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # elements of a 32-bit word
_KINDS = {torch.float32: binding.FLOAT32, torch.bfloat16: binding.BFLOAT16, torch.int8: binding.INT8}


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix of `outputs` by `inputs` in packed form; keeps the memory that `struct()` points at.

    data: [blocks, words, lanes, elements a word]; scale, sums: [N] fp32 and int32 for int8, else None.
    """

    outputs: int
    inputs: int
    data: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    sums: Tensor | None = None

    def struct(self) -> binding.Matrix:
        return binding.Matrix(
            kind=_KINDS[self.data.dtype],
            n=self.outputs,
            k=self.inputs,
            data=self.data.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            sum=None if self.sums is None else self.sums.data_ptr(),
        )


def pack(weight: Tensor, library: Any, bias: Tensor | None = None) -> PackedMatrix:
    """weight: [N, K] of float32, bfloat16 or int8; bias: [N] fp32; library: whose lanes and tiles it is packed for."""
    outputs, inputs = weight.shape
    lanes, per_word = library.hnet_lanes(), _PER_WORD[weight.dtype]
    multiple = per_word * library.hnet_word_multiple(_KINDS[weight.dtype])
    padded = F.pad(weight, (0, -inputs % multiple, 0, -outputs % lanes))
    blocks = padded.view(padded.shape[0] // lanes, lanes, -1, per_word)
    return PackedMatrix(outputs, inputs, blocks.permute(0, 2, 1, 3).contiguous(), bias)


def quantize(weight: Tensor, library: Any) -> PackedMatrix:
    """weight: [N, K] → 8 bits with one scale an output, the largest magnitude at 127."""
    wide = weight.float()
    scale = wide.abs().amax(1) / 127.0
    numbers = torch.round(wide / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).to(torch.int8)
    packed = pack(numbers, library)
    sums = numbers.sum(1, dtype=torch.int32)
    return PackedMatrix(packed.outputs, packed.inputs, packed.data, scale=scale, sums=sums)
