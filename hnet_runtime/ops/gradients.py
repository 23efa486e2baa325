"""Forms of elementwise operations for when a gradient is asked for.

Knows nothing of models. The functions are those of their namesakes in this package; what differs is the order of
summation, which is the library's, and that a backward pass reads its inputs once and is finite wherever the function
is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def asked_for(*tensors: Tensor) -> bool:
    """Whether autograd will want to know how what is made of these came about."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis. x: [T, D] fp32, weight: [D] fp32 → [T, D] fp32."""
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
        context.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, weight, scale = context.saved_tensors
        normed = x * scale
        weight_gradient = (gradient * normed).sum(0)
        inner = gradient * weight
        shared = (inner * normed).mean(-1, keepdim=True)
        return inner.sub_(normed.mul_(shared)).mul_(scale), weight_gradient, None
