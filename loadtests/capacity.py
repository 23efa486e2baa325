"""The highest load at which a promise holds, by trying. Knows numbers; no server."""

from __future__ import annotations

import math
from collections.abc import Callable


def search(holds: Callable[[float], bool], first: float, precision: float, most: int) -> float | None:
    """The highest rate found at which it holds, no more than the factor `precision` below one at which it does not.

    Doubles (or halves) from `first` until it knows one of each, then tries their geometric mean; `most` tries in all,
    after which the answer may be coarser. None where it never held.
    """
    if first <= 0 or precision <= 1 or most < 1:
        raise ValueError("a search needs a positive first rate, a precision above 1 and a try")
    low, high = 0.0, math.inf
    rate = first
    for _ in range(most):
        if holds(rate):
            low = rate
        else:
            high = rate
        if low and high / low <= precision:
            break
        rate = low * 2 if math.isinf(high) else high / 2 if not low else math.sqrt(low * high)
    return low or None
