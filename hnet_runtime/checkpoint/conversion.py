"""Writing a model as `config.json` and `model.safetensors`, under the official key names.

Knows how the two files are laid out and how to put them in place whole or not at all.
Holds one tensor in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from hnet_runtime.checkpoint.directory import CONFIG_NAME, SAFETENSORS_NAME
from hnet_runtime.checkpoint.errors import CheckpointError
from hnet_runtime.checkpoint.load import Progress, check_entries, check_tied_head, parameter_dtype
from hnet_runtime.checkpoint.locate import ModelSource
from hnet_runtime.checkpoint.random_weights import random_tensor
from hnet_runtime.checkpoint.tensor_files import open_tensor_files
from hnet_runtime.config import tensor_shapes

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_PARTIAL = ".partial"

DTypeName = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_Reader = Callable[[str], torch.Tensor]


def convert(
    source: ModelSource,
    destination: str | Path,
    dtype: torch.dtype | DTypeName | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes `config.json` and `model.safetensors` into the directory `destination`; returns it.

    Tensors keep the dtype they are stored in, or with `dtype` (or its name) get `parameter_dtype(key, dtype)`. The
    directory is made if need be; one that is not empty is refused unless `force`. Each file appears
    whole or not at all. `progress` is called with (bytes written, bytes in all). Raises CheckpointError,
    or OSError where the files cannot be written.
    """
    directory = Path(destination)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; name the directory to write to")
    if directory.suffix in (".safetensors", ".pt"):
        raise CheckpointError(f"{directory}: is written as a directory; name one, not a file")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise CheckpointError(f"{directory}: is not empty; --force replaces {CONFIG_NAME} and {SAFETENSORS_NAME} there")
    wanted = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    with _open_source(source, wanted) as (dtypes, read):
        created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with _whole_file(directory / SAFETENSORS_NAME) as partial:
                _write_safetensors(partial, source, dtypes, read, progress)
            with _whole_file(directory / CONFIG_NAME) as partial:
                partial.write_text(json.dumps(dict(source.config.source), indent=2) + "\n", encoding="utf-8")
        except BaseException:
            if created and not any(directory.iterdir()):
                directory.rmdir()
            raise
    return directory


@contextlib.contextmanager
def _open_source(source: ModelSource, dtype: torch.dtype | None) -> Iterator[tuple[dict[str, torch.dtype], _Reader]]:
    """The dtype each tensor will be written in, and how to read it."""
    keys = tensor_shapes(source.config)
    if source.is_random:
        chosen = {key: parameter_dtype(key, dtype or torch.float32) for key in keys}
        yield chosen, lambda key: random_tensor(source.config, key, source.seed)
        return
    with open_tensor_files(source.weights) as entries:
        check_entries(source, entries)
        check_tied_head(source, entries)
        stored = {key: entries[key].dtype or torch.float32 for key in keys}
        chosen = {key: parameter_dtype(key, dtype) if dtype else stored[key] for key in keys}
        yield chosen, lambda key: entries[key].file.read(key)


def _write_safetensors(
    path: Path, source: ModelSource, dtypes: dict[str, torch.dtype], read: _Reader, progress: Progress | None
) -> None:
    """The format: the header's length (8 bytes, little endian), the header as JSON, the tensors end to end."""
    shapes = tensor_shapes(source.config)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Widest dtypes first, so that every tensor starts at a multiple of its own item size.
    order = sorted(shapes, key=lambda key: -dtypes[key].itemsize)
    for key in order:
        end = offset + dtypes[key].itemsize * torch.Size(shapes[key]).numel()
        header[key] = {"dtype": _DTYPE_NAMES[dtypes[key]], "shape": list(shapes[key]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = read(key).to(dtypes[key]).contiguous()
            done += file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(done, offset)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` once the block has ended well, and else vanishes."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
