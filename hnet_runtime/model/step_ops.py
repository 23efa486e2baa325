"""The operations of a static step, under one set of names: in plain torch, or as Triton kernels.

Knows their signatures; what each computes its twin in `hnet_runtime.ops` says. Matrix products belong to neither: they
are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor, dtype

_HOMES = {
    "add_rms_norm": "norm",
    "gated_norm_step": "norm",
    "conv_step": "conv",
    "ssm_step": "ssm",
    "rotate_and_keep": "attention",
    "decode_attention": "attention",
    "swiglu": "swiglu",
    "enter_step": "entry",
    "resume_step": "entry",
    "surface_step": "entry",
    "next_places": "places",
    "last_places": "places",
    "router_step": "router",
    "descend_step": "boundary",
    "park_step": "boundary",
    "ema_step": "ema",
    "ema_kept": "ema",
    "draw_step": "drawing",
}
"""The module of each operation, in both packages."""


@dataclass(frozen=True)
class StepOps:
    """Every function takes and gives tensors whose shapes depend on shapes alone, reads nothing on the host, and
    updates state in place."""

    name: str
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    gated_norm_step: Callable[[Tensor, Tensor, Tensor], Tensor]
    conv_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    ssm_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    rotate_and_keep: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    decode_attention: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int | None, int],
        Tensor,
    ]
    swiglu: Callable[[Tensor], Tensor]
    enter_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    resume_step: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    surface_step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    next_places: Callable[[Tensor, Tensor, Tensor | None, int | None], tuple[Tensor, Tensor]]
    last_places: Callable[[Tensor, Tensor, Tensor | None, int | None], tuple[Tensor, Tensor]]
    router_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    descend_step: Callable[
        [Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    ]
    park_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ema_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    ema_kept: Callable[[Tensor, Tensor, Tensor, dtype], Tensor]
    draw_step: Callable[
        [Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None
    ]

    @classmethod
    def torch(cls) -> StepOps:
        """The plain forms, for any device."""
        return cls._of("torch", "hnet_runtime.ops")

    @classmethod
    def triton(cls) -> StepOps:
        """The kernels, for CUDA. Raises ImportError where there is no Triton."""
        return cls._of("triton", "hnet_runtime.ops.triton")

    @classmethod
    def _of(cls, name: str, package: str) -> StepOps:
        return cls(name, **{each: getattr(import_module(f"{package}.{home}"), each) for each, home in _HOMES.items()})
