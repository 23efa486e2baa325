"""RMSNorm, plain, with the residual stream, and gated."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.config import NORM_EPS
from hnet_runtime.ops import gradients
from hnet_runtime.ops.activation import silu


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) · weight, in fp32.

    x: [T, D] fp32, weight: [D] fp32 → [T, D] fp32.
    """
    if gradients.asked_for(x, weight):
        return gradients.rms_norm(x, weight, NORM_EPS)
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x * torch.rsqrt(mean_square + NORM_EPS) * weight


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm(y · SiLU(gate)): Mamba-2's output norm, gate first.

    y, gate: [T, E] fp32, weight: [E] fp32 → [T, E] fp32.
    """
    return rms_norm(y * silu(gate), weight)


def add_rms_norm(h: Tensor, residual: Tensor, weight: Tensor, begins: bool) -> Tensor:
    """residual += h, then RMSNorm of it, rounded: what stands before every mixer and MLP, and at a stack's end.

    h: [B, D] in the model's dtype, residual: [B, D] fp32 (updated in place), weight: [D] fp32, begins: whether the
    residual stream begins here, at 0, whatever its memory holds → [B, D] in h's dtype.
    """
    if begins:
        residual.zero_()
    residual.add_(h)
    return rms_norm(residual, weight).to(h.dtype)


def gated_norm_step(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """`gated_rms_norm` of rounded numbers, rounded again.

    y: [B, E] and gate: [B, E] (a view with any row stride) in the model's dtype, weight: [E] fp32 → [B, E] in y's
    dtype.
    """
    return gated_rms_norm(y.float(), gate.float(), weight).to(y.dtype)
