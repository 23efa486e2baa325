"""From weight files to the tensors a model needs, checked key by key.

Knows the official keys and which of them stay in float32. Does not know what they compute.
Memory: the model, in the dtype asked for, plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hnet_runtime.checkpoint.errors import CheckpointError, and_more
from hnet_runtime.checkpoint.locate import ModelSource
from hnet_runtime.checkpoint.random_weights import random_tensor
from hnet_runtime.checkpoint.tensor_files import TensorEntry, open_tensor_files
from hnet_runtime.config import tensor_shapes

HEAD, EMBEDDINGS = "lm_head.weight", "embeddings.weight"
_FLOAT32_SUFFIXES = (".mixer.D", ".mixer.A_log", ".mixer.dt_bias")

Progress = Callable[[int, int], None]


def parameter_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a parameter is held in, in a model of `dtype`.

    The residual projections and the three vectors that drive the recurrence stay in float32:
    boundaries are decided by a threshold downstream of them.
    """
    if ".residual_proj." in key or key.endswith(_FLOAT32_SUFFIXES):
        return torch.float32
    return dtype


def load_weights(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of `tensor_shapes(source.config)`, contiguous, each in `parameter_dtype(key, dtype)`.

    Peak memory is the model plus one tensor: files are mapped, and every key and shape is
    checked before the first tensor is read. `progress` is called with (bytes done, bytes in all) of the
    model as it will be in memory. Raises CheckpointError naming the file and the key.
    """
    shapes = tensor_shapes(source.config)
    sizes = {key: _size(shape) * parameter_dtype(key, dtype).itemsize for key, shape in shapes.items()}
    weights: dict[str, torch.Tensor] = {}
    done, total = 0, sum(sizes.values())

    def keep(key: str, tensor: torch.Tensor) -> None:
        nonlocal done
        weights[key] = tensor
        done += sizes[key]
        if progress is not None:
            progress(done, total)

    if source.is_random:
        for key in shapes:
            keep(key, random_tensor(source.config, key, source.seed).to(device, parameter_dtype(key, dtype)))
        return weights
    with open_tensor_files(source.weights) as entries:
        check_entries(source, entries)
        check_tied_head(source, entries)
        for key in shapes:
            # What a file gives may be a view of it: always a copy, even where dtype and device agree.
            target = torch.empty(shapes[key], dtype=parameter_dtype(key, dtype), device=device)
            keep(key, target.copy_(entries[key].file.read(key)))
    return weights


def check_entries(source: ModelSource, entries: Mapping[str, TensorEntry]) -> None:
    """Raises CheckpointError unless the files hold exactly the tensors that the configuration calls for."""
    shapes = tensor_shapes(source.config)
    where = _where(source)
    missing = [key for key in shapes if key not in entries]
    unexpected = [key for key in entries if key not in shapes and not _is_tied_head(source, key)]
    if missing:
        also = f"; unexpected key {unexpected[0]!r}{and_more(unexpected)}" if unexpected else ""
        raise CheckpointError(f"{where}: missing key {missing[0]!r}{and_more(missing)}{also}")
    if unexpected:
        raise CheckpointError(
            f"{entries[unexpected[0]].file.path}: unexpected key {unexpected[0]!r}{and_more(unexpected)}"
        )
    expected = {**shapes, HEAD: shapes[EMBEDDINGS]}
    wrong = [key for key, entry in entries.items() if entry.shape != expected[key]]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{entries[key].file.path}: key {key!r} has shape {list(entries[key].shape)},"
            f" but the configuration calls for {list(expected[key])}{and_more(wrong)}"
        )
    for key, entry in entries.items():
        if entry.dtype is None:
            raise CheckpointError(f"{entry.file.path}: key {key!r} is {entry.dtype_name}, not a floating-point tensor")


def _is_tied_head(source: ModelSource, key: str) -> bool:
    return key == HEAD and source.config.tie_embeddings


def check_tied_head(source: ModelSource, entries: Mapping[str, TensorEntry]) -> None:
    """Raises CheckpointError where a head stored beside tied embeddings is not the embeddings."""
    if HEAD not in entries or not source.config.tie_embeddings:
        return
    head, embeddings = (entries[key].file.read(key) for key in (HEAD, EMBEDDINGS))
    if not torch.equal(head.float(), embeddings.float()):
        raise CheckpointError(
            f"{entries[HEAD].file.path}: key {HEAD!r} differs from {EMBEDDINGS!r}, but the configuration ties them"
        )


def _where(source: ModelSource) -> str:
    return str(source.weights[0] if len(source.weights) == 1 else source.weights[0].parent)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
