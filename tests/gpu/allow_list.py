"""What a captured step may call: ATen operations that are kernels of a fixed shape, on memory that stays where it is.

A list of what is forbidden would miss operations that wait for the device inside (`linalg.inv`, `x[mask] = y`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names(
    "view _unsafe_view reshape _reshape_alias t transpose permute slice select expand unsqueeze squeeze split unbind "
    "split_with_sizes alias as_strided detach flatten unflatten chunk narrow view_as"
)
EMPTY = _names("empty empty_like new_empty empty_strided new_empty_strided")
FACTORIES = EMPTY | _names("zeros zeros_like new_zeros ones ones_like full full_like new_full arange")
POINTWISE = _names(
    "add sub rsub mul div neg exp log log1p sqrt rsqrt reciprocal pow cos sin sigmoid silu abs clamp clamp_min "
    "clamp_max maximum minimum where gt ge lt le eq ne logical_and logical_or logical_not bitwise_and bitwise_or "
    "bitwise_not isfinite remainder floor_divide fill masked_fill copy _to_copy clone zero scalar_tensor "
    "bitwise_xor __rshift__ __lshift__"
)
ACROSS = _names(
    "sum amax amin cumsum argmax any all mean sort searchsorted gather scatter scatter_add index_select index_copy "
    "index cat stack mm bmm addmm flip"
)
MASKS = (torch.bool, torch.uint8)
ALLOWED = VIEWS | FACTORIES | POINTWISE | ACROSS


class NotCapturable(AssertionError):
    """An operation that a CUDA graph cannot hold, or that would hold a value of the moment for ever."""


def name_of(func: Any) -> str:
    """`add_.Tensor` → `add`: in place or not is a matter of what is written, not of whether it can be captured."""
    name: str = func._schema.name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def storage_of(tensor: Tensor) -> int:
    """The memory a tensor is a view of."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation writes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[index] if index < len(args) else kwargs.get(argument.name))


class AllowList(TorchDispatchMode):
    """Raises NotCapturable at the first operation that is not on the list, or that is and touches memory of another
    device, memory that nobody declared, or writes what is declared constant.

    constants, state: all the tensors that there are before; a step may write the latter, and what it makes itself.
    `written` are the storages of `state` that it wrote.
    """

    def __init__(self, device: str, constants: Iterable[Tensor], state: Iterable[Tensor]) -> None:
        super().__init__()
        self._device = device
        self._constants = {storage_of(tensor) for tensor in constants}
        self._state = {storage_of(tensor) for tensor in state}
        self._own: dict[int, Tensor] = {}  # kept alive, so that no storage takes another one's address
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.startswith("prim::"):  # questions about a tensor, such as its device
            return func(*args, **kwargs)
        self._check(func, args, kwargs)
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self._require_device(func, tensor)
            if not self._is_declared(tensor):
                self._own[storage_of(tensor)] = tensor
        return out

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = name_of(func)
        if name not in ALLOWED:
            raise NotCapturable(f"{func} is not on the list of what can be captured")
        for tensor in tensors_in((args, kwargs)):
            self._require_device(func, tensor)
            if not self._is_declared(tensor) and storage_of(tensor) not in self._own:
                raise NotCapturable(
                    f"{func} reads a tensor that is neither declared nor made by the step: {tensor.shape}"
                )
        if name in ("index", "index_put") and any(each.dtype in MASKS for each in tensors_in(args[1])):
            raise NotCapturable(f"{func} by a mask: how much it chooses depends on data")
        for tensor in written_by(func, args, kwargs):
            storage = storage_of(tensor)
            if storage in self._state:
                self.written.add(storage)
            elif storage in self._constants:
                raise NotCapturable(f"{func} writes a constant: {tensor.shape}")

    def _require_device(self, func: Any, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            raise NotCapturable(f"{func} meets a tensor on {tensor.device}: {tensor.shape}")

    def _is_declared(self, tensor: Tensor) -> bool:
        storage = storage_of(tensor)
        return storage in self._constants or storage in self._state
