"""RMSNorm, plain, with the residual stream, and gated."""

from __future__ import annotations

import torch
from torch import Tensor

from hnet_runtime.config import NORM_EPS
from hnet_runtime.ops.activation import silu


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) · weight, in fp32.

    x: [T, D] fp32, weight: [D] fp32 → [T, D] fp32.
    """
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x * torch.rsqrt(mean_square + NORM_EPS) * weight


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm(y · SiLU(gate)): Mamba-2's output norm, gate first.

    y, gate: [T, E] fp32, weight: [E] fp32 → [T, E] fp32.
    """
    return rms_norm(y * silu(gate), weight)
