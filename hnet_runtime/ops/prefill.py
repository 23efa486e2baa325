"""The operations of prefill, under one set of names: in plain torch, or as kernels for CUDA.

Knows their signatures; what each computes its twin in this package says. Matrix products, norms and the router belong
to neither: they are torch's. Nothing here imports Triton: `triton.adapters` makes the other form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hnet_runtime.ops import attention, conv, ema, rotary, ssm
from hnet_runtime.ops.attention import KeyGrid, SlotsOf
from hnet_runtime.ops.spans import Ints, Spans

Op = Literal["scan", "convolution", "attention", "smoothing"]
OPS: tuple[Op, ...] = ("scan", "convolution", "attention", "smoothing")


@dataclass(frozen=True)
class PrefillOps:
    """Every function takes packed positions and their Spans, and updates rows' memory in place.

    forms: what runs each op (`torch`, `triton`, or a library's name).
    selective_scan, causal_conv: the last argument is the dtype of what they give; inputs are in the model's.
    keys: (spans, window, slots of (rows, positions), page table [rows, pages] or None, capacity of a ring or None) →
    what `attend` is told of the keys: the same for all layers of a stage.
    """

    forms: Mapping[Op, str]
    selective_scan: Callable[..., Tensor]
    causal_conv: Callable[..., Tensor]
    rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
    keys: Callable[[Spans, int, SlotsOf, Ints | None, int | None], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any], Tensor]
    smooth: Callable[[Tensor, Tensor, Tensor, Spans], Tensor]

    @classmethod
    def torch(cls) -> PrefillOps:
        """The plain forms, for any device."""
        return cls(
            forms=dict.fromkeys(OPS, "torch"),
            selective_scan=ssm.selective_scan,
            causal_conv=conv.causal_conv,
            rotate=rotary.rotate,
            keys=_key_grid,
            attend=attention.attend,
            smooth=ema.smooth,
        )


def _key_grid(spans: Spans, window: int, slots_of: SlotsOf, table: Ints | None, capacity: int | None) -> KeyGrid:
    del table  # slots_of reads it
    return KeyGrid(spans, window, slots_of, capacity)
