"""The SwiGLU product between an MLP's two projections."""

from __future__ import annotations

from torch import Tensor

from hnet_runtime.ops.activation import silu


def swiglu(y: Tensor) -> Tensor:
    """SiLU(gate) · value.

    y: [T, 2F] = [value, gate], the released models' order → [T, F] in y's dtype.
    """
    value, gate = y.float().chunk(2, dim=-1)
    return (silu(gate) * value).to(y.dtype)
