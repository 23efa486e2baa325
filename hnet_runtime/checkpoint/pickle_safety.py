"""Opening an official `.pt` without running anything that is in it.

Knows pickles and zip archives, and the few names such files may refer to. Does not know
which tensors an H-Net needs. The pickle machine used is torch's restricted one; names that
it does not know are refused before it starts, except those of configuration containers,
which become objects that hold nothing and do nothing.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hnet_runtime.checkpoint.errors import CheckpointError, and_more

_ZIP_MAGIC = b"PK\x03\x04"
_LFS_POINTER = b"version https://git-lfs"
_CONTAINERS = "omegaconf."
# What the pickle of a configuration container names besides the containers' own classes.
_NAMED_BY_CONTAINERS = (
    "typing.Any",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    *(
        f"builtins.{name}"
        for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple", "type")
    ),
)


class Inert:
    """Stands in for any class a configuration container's pickle names: keeps nothing, does nothing."""

    def __new__(cls, *arguments: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*arguments: object) -> dict[Any, Any]:
    """Stands in for `collections.defaultdict`, whose factory is of no use here."""
    return {}


def open_pickle(path: Path) -> Any:
    """The object in a `.pt` file, its tensors mapped from the file and not yet read.

    Tensors cost no memory until they are used, and then only page cache. Raises CheckpointError for
    a file that is truncated, is no PyTorch archive, or refers to anything but tensors.
    """
    _check_archive(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals(_stand_ins(path, names)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: its pickle is not one of plain tensors ({_reason(error)})") from error
    except (
        ArithmeticError, AssertionError, AttributeError, EOFError, LookupError,
        MemoryError, RuntimeError, TypeError, ValueError, struct.error,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: damaged: cannot be read as a PyTorch archive ({_reason(error)})") from error


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path}: empty file")
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights themselves; fetch them with 'git lfs pull'")
    if not head.startswith(_ZIP_MAGIC):
        if head.startswith(b"\x80"):
            raise CheckpointError(
                f"{path}: refused: a bare pickle or a PyTorch file from before 1.6; save it again with torch.save"
            )
        raise CheckpointError(f"{path}: not a PyTorch checkpoint")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: truncated: the archive's directory at its end is missing")


def _stand_ins(path: Path, names: list[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """A stand-in for each name the pickle refers to, or CheckpointError for one that is not harmless."""
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    refused = []
    for name in sorted(names):
        if name == "collections.defaultdict":
            stand_ins.append((_plain_dict, name))
        elif name.startswith(_CONTAINERS) or name in _NAMED_BY_CONTAINERS:
            stand_ins.append((Inert, name))
        else:
            refused.append(name)
    if refused:
        raise CheckpointError(
            f"{path}: refused: its pickle refers to {refused[0]}{and_more(refused)};"
            " loading runs no code from a checkpoint"
        )
    return stand_ins


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
