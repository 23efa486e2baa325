"""Weight files as they are on disk: keys, shapes and dtypes first, tensors one at a time.

Knows the two formats, safetensors and `.pt`. Does not know what an H-Net needs: see load.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from hnet_runtime.checkpoint.errors import CheckpointError
from hnet_runtime.checkpoint.pickle_safety import open_pickle

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FLOAT_DTYPES = frozenset(_SAFETENSORS_DTYPES.values())
_log = logging.getLogger(__name__)
# The usual names for a state dict that was saved inside another dict.
_WRAPPERS = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, not yet read. `dtype` is None where it is not one of FLOAT_DTYPES."""

    file: TensorFile
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str


class TensorFile(Protocol):
    """An open weight file."""

    path: Path

    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor of the file by its key."""

    def read(self, key: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored; may be a view of the file, so it is to be copied."""


@contextmanager
def open_tensor_files(paths: tuple[Path, ...]) -> Iterator[dict[str, TensorEntry]]:
    """The tensors of all files together, by key; a key in two files is an error."""
    with ExitStack() as stack:
        merged: dict[str, TensorEntry] = {}
        for path in paths:
            is_pickle = path.suffix != ".safetensors"
            file: TensorFile = PickleFile(path) if is_pickle else stack.enter_context(_open_safetensors(path))
            for key, entry in file.entries().items():
                if key in merged:
                    raise CheckpointError(f"{path}: key {key!r} is also in {merged[key].file.path}")
                merged[key] = entry
        yield merged


class SafetensorsFile:
    """A `.safetensors` file, open while its context lasts."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle

    def entries(self) -> dict[str, TensorEntry]:
        found = {}
        for key in self._handle.keys():  # noqa: SIM118 - the handle is no mapping
            part = self._handle.get_slice(key)
            name = part.get_dtype()
            found[key] = TensorEntry(self, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(name), name)
        return found

    def read(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(key)
        return tensor


@contextmanager
def _open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    with handle as opened:
        yield SafetensorsFile(path, opened)


class PickleFile:
    """An official `.pt`: a flat dict of tensors, perhaps inside another dict under a usual name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _state_dict(open_pickle(path), path)

    def entries(self) -> dict[str, TensorEntry]:
        found = {}
        for key, tensor in self._tensors.items():
            dtype = tensor.dtype if tensor.dtype in FLOAT_DTYPES else None
            found[key] = TensorEntry(self, tuple(tensor.shape), dtype, str(tensor.dtype).removeprefix("torch."))
        return found

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key].detach()


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """The one dict of tensors in what a `.pt` holds. Entries that are not tensors are no weights."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors")
    nested = {
        str(key): tensors
        for key, value in loaded.items()
        if isinstance(value, Mapping) and (tensors := _tensors_of(value, path))
    }
    usual = [key for key in _WRAPPERS if key in nested]
    if len(usual) == 1:
        return nested[usual[0]]
    flat = _tensors_of(loaded, path)
    if flat:
        others = [str(key) for key in loaded if str(key) not in flat]
        if others:
            _log.info("%s: entries that are no tensors are left aside: %s", path, ", ".join(others))
        return flat
    if not nested:
        raise CheckpointError(f"{path}: holds no tensors, so it is not a checkpoint")
    listed = ", ".join(repr(key) for key in nested)
    raise CheckpointError(f"{path}: tensors are inside {listed}, and which of them is the model is not clear")


def _tensors_of(mapping: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    tensors = {str(key): value for key, value in mapping.items() if isinstance(value, torch.Tensor)}
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {key!r} is not a plain dense tensor")
    return tensors
