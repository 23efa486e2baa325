"""What a CUDA graph does, done on a CPU: the operations of one run on the memory of that run, again and again.

A replay runs no Python of the step. So a number that Python read once stays what it was, a tensor that Python bound
anew is bound to nobody, and memory made in the run keeps its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tests.gpu.allow_list import EMPTY, VIEWS, AllowList, name_of, storage_of, tensors_in, written_by


class Tape(AllowList):
    """Records what runs under it, on the CPU, where it can be captured at all."""

    def __init__(self, constants: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        super().__init__("cpu", constants, state)
        self._entries: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.num_operations = 0
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = name_of(func)
        if func._schema.name.startswith("prim::"):
            return out
        read = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        fresh = [tensor for tensor in tensors_in(out) if storage_of(tensor) not in read]
        self._made += fresh
        if name in EMPTY or (name in VIEWS and not fresh):
            return out
        self.num_operations += 1
        if fresh or any(True for _ in written_by(func, args, kwargs)):
            self._entries.append((func, args, kwargs, fresh))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self._entries:
                out = func(*args, **kwargs)
                if fresh:
                    for place, tensor in zip(fresh, tensors_in(out), strict=True):
                        place.copy_(tensor)

    def spoil(self) -> None:
        """Fills the memory that the run made with what nobody can mistake for a result: other graphs share the pool."""
        for tensor in self._made:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


class EmulatedGraphs:
    """Captures steps as the engine's graphs are captured, and replays them."""

    mode: Literal["graph", "eager"] = "graph"
    num_bytes = 0

    def __init__(self, *, spoils: bool = False) -> None:
        self._spoils = spoils  # before each replay
        self.tapes: list[Tape] = []

    def capture(
        self, run: Callable[[], None], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> Callable[[], None]:
        before = [tensor.clone() for tensor in state]
        tape = Tape(constants, state)
        with torch.no_grad(), tape:
            run()
        # A capture runs nothing: what the run has done is undone.
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self.tapes.append(tape)

        def replay() -> None:
            if self._spoils:
                self.spoil()
            tape.replay()

        return replay

    def spoil(self) -> None:
        """As if another graph of the pool had been replayed: only static memory keeps what it has."""
        for tape in self.tapes:
            tape.spoil()
