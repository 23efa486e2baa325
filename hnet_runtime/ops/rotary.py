"""Rotary position embedding over the first channels of each head, half-split."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10000.0


def inverse_frequencies(rotary_dim: int, device: torch.device) -> Tensor:
    """base^(−2i/rotary_dim), the angle that pair i turns by at each position: [rotary_dim / 2] fp32."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    return 1.0 / torch.pow(ROTARY_BASE, exponent)


def rotary_table(positions: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i/rotary_dim), angles in fp32.

    positions: [T] int64 → two [T, 1, rotary_dim / 2] fp32.
    """
    angle = positions.float().unsqueeze(-1) * inverse_frequencies(rotary_dim, positions.device)
    return torch.cos(angle).unsqueeze(1), torch.sin(angle).unsqueeze(1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i together with channel i + rotary_dim / 2; the rest passes.

    x: [T, H, P] → [T, H, P] in x's dtype.
    """
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat((turned[0].to(x.dtype), turned[1].to(x.dtype), rest), dim=-1)
