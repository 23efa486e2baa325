"""SiLU and softplus whose bits do not depend on where an element stands in its tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.ops import gradients

SOFTPLUS_THRESHOLD = 20.0  # above it softplus(x) is x; the value torch and mamba-ssm use


def silu(x: Tensor) -> Tensor:
    """x · σ(x), any shape, fp32 in and out."""
    if gradients.asked_for(x):
        return F.silu(x)
    return x / (1.0 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), any shape, fp32 in and out; linear above the threshold."""
    return torch.where(x > SOFTPLUS_THRESHOLD, x, torch.log1p(torch.exp(x.clamp(max=SOFTPLUS_THRESHOLD))))
