"""How an op of this package is declared and how its kernels are launched: the one place that can watch them.

Knows tensors and kernels; nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS: dict[str, Any] = {}
"""Every op that is declared to torch, by its name."""


@dataclass(frozen=True)
class Launch:
    """One kernel as it was launched: arguments by name (tensors and numbers), constants, and options of the compiler.

    What Triton specializes a kernel for beside its constants, it is told of the arguments as here: whether a tensor
    begins at, and a number is, a multiple of 16; and a number that is 1 becomes a constant. Of numbers that change from
    one prompt to the next kernels say that they must not (`do_not_specialize`): a server does not stop to compile.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, enable_fp_fusion

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")

    @property
    def types(self) -> dict[str, str]:
        """Of every parameter, in Triton's words: `*bf16`, `i32`, `constexpr`."""
        given = {name: _type_of(value) for name, value in self.arguments.items()}
        given |= dict.fromkeys(self._specialized(_is_one), "constexpr")
        return {name: given.get(name, "constexpr") for name in self.kernel.arg_names}

    @property
    def fixed(self) -> dict[str, Any]:
        """The constants, and the arguments that are 1."""
        return self.constants | dict.fromkeys(self._specialized(_is_one), 1)

    @property
    def aligned(self) -> tuple[str, ...]:
        """Arguments that are multiples of 16: of a tensor, the address of its first number."""
        return self._specialized(_is_aligned)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that the same compiled kernel serves."""
        fixed = tuple(sorted((name, str(value)) for name, value in self.fixed.items()))
        return (self.kernel, tuple(self.types.items()), fixed, self.aligned, *sorted(self.options.items()))

    def _specialized(self, condition: Callable[[Any], bool]) -> tuple[str, ...]:
        """Arguments that meet a condition for which the kernel is specialized."""
        general = self.kernel.do_not_specialize or ()
        return tuple(name for name, value in self.arguments.items() if name not in general and condition(value))


_TYPES = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0  # storage begins at a multiple of 256
    return isinstance(value, int) and value % 16 == 0


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
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    enable_fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Runs `kernel` over `grid`: arguments in the kernel's order, then its compile-time constants by name.

    enable_fp_fusion: whether a product and a sum may become one operation, with one rounding; without it the numbers of
    a kernel that only multiplies and adds are its twin's.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _recorded.append(Launch(kernel, grid, named, constants, options))
    elif all(grid):
        kernel[grid](*arguments, **options, **constants)


def operation(*, fake: Callable[..., R], mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares an op to torch as `hnet::<its name>`, so that fake tensors, dispatch modes and capture see one op.

    fake: gives outputs of the right shapes from the same arguments; mutates: the arguments that are updated in place.
    """

    def declare(run: Callable[P, R]) -> Callable[P, R]:
        declared = torch.library.custom_op(f"hnet::{run.__name__}", run, mutates_args=mutates)
        declared.register_fake(fake)
        OPERATIONS[run.__name__] = declared

        @wraps(run)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            # Through torch, tensors without memory would be answered by `fake`, and nothing launched.
            return (cast("Callable[P, R]", declared) if _recorded is None else run)(*arguments, **named)

        return call

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
