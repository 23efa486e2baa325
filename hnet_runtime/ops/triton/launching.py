"""How an op of this package is declared and how its kernels are launched: the one place that can watch them.

Knows tensors and kernels; nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS: dict[str, Callable[..., Any]] = {}
"""Every op by its name, as the function that launches its kernels."""


@dataclass(frozen=True)
class Launch:
    """One kernel as it was launched: its arguments by name (tensors and numbers) and its compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Kernels are listed instead of run; the ops' tensors may then be on the meta device. Not for threads."""
    global _recorded
    assert _recorded is None, "recording already"
    found: list[Launch] = []
    _recorded = found
    try:
        yield found
    finally:
        _recorded = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Runs `kernel` over `grid`: arguments in the kernel's order, then its compile-time constants by name."""
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _recorded.append(Launch(kernel, grid, named, constants, num_warps, num_stages))
    elif all(grid):
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def operation(*, fake: Callable[..., R], mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares an op to torch as `hnet::<its name>`, so that fake tensors, dispatch modes and capture see one op.

    fake: gives outputs of the right shapes from the same arguments; mutates: the arguments that are updated in place.
    """

    def declare(run: Callable[P, R]) -> Callable[P, R]:
        name = run.__name__
        OPERATIONS[name] = run
        declared = torch.library.custom_op(f"hnet::{name}", run, mutates_args=mutates)
        declared.register_fake(fake)
        return cast("Callable[P, R]", declared)

    return declare


def row_stride(tensor: Tensor) -> int:
    """Numbers from one row of a [B, D] view to the next; ValueError unless those of a row are adjacent."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"the last axis must be contiguous; strides are {tensor.stride()}")
    return tensor.stride(0)


def contiguous(*tensors: Tensor) -> None:
    """ValueError unless all are contiguous: a copy would not be updated in place."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"must be contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}")


def power_of_two(size: int) -> int:
    """The least power of two that is not smaller."""
    return int(triton.next_power_of_2(size))


def blocks(size: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-size // block)
