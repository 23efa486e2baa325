"""Host memory that a device copies from and to by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pinned(shape: Sequence[int], dtype: type[np.generic]) -> Tensor:
    """Zeros, page-locked where there is a GPU; `.numpy()` of it is the same memory."""
    memory = torch.from_numpy(np.zeros(shape, dtype=dtype))
    return memory.pin_memory() if torch.cuda.is_available() else memory
