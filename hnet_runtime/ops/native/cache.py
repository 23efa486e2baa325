"""Packed weights in a file, mapped into memory the next time: nothing is read twice, and processes share the pages.

Knows names, tensors and files; not what the tensors are. An entry is one file of 64-byte-aligned tensors behind a JSON
index. It is made beside its place and renamed into it, so that a reader never sees half of one. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
VARIABLE = "HNET_WEIGHT_CACHE"
_MAGIC = b"hnet-packed-1\n"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int32)
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheKey:
    """What packed weights depend on: the files they came from, by path, size and time, and how they were packed."""

    sources: tuple[tuple[str, int, int], ...]
    packing: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[Path], *packing: str) -> CacheKey:
        resolved = [file.resolve() for file in files]
        return cls(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in resolved), packing)

    @property
    def file_name(self) -> str:
        text = json.dumps([self.sources, self.packing])
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.hnetpacked"


def cache_directory(setting: str | None) -> Path | None:
    """Where entries live: `setting`, else HNET_WEIGHT_CACHE, else the user's cache directory; None for `off`."""
    chosen = setting or os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hnet-serve" / "packed"


def load(directory: Path, key: CacheKey) -> dict[str, Tensor] | None:
    """The entry's tensors, mapped copy-on-write; None where there is none, or where it is not whole."""
    path = directory / key.file_name
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            index = json.loads(file.readline())
        mapped = np.memmap(path, dtype=np.uint8, mode="c")
        if len(mapped) != index["size"]:
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s: cannot be used and is left alone: %s", path, error)
        return None
    with suppress(OSError):
        os.utime(path)  # used now: what is unused longest goes first
    return {
        name: torch.from_numpy(mapped[start:end]).view(_DTYPES[dtype]).view(shape)
        for name, (dtype, shape, start, end) in index["tensors"].items()
    }


def store(directory: Path, key: CacheKey, tensors: Mapping[str, Tensor]) -> bool:
    """Writes an entry; where that cannot be done it is logged and False, since serving goes on without.

    Entries whose source files are gone or have changed are removed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory)
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            try:
                _write(file, key, tensors)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        temporary.replace(directory / key.file_name)
    except OSError as error:
        _log.warning("packed weights are not cached: %s", error)
        return False
    return True


def _write(file: Any, key: CacheKey, tensors: Mapping[str, Tensor]) -> None:
    # The index holds offsets and stands before what they point at: it gets room for them first.
    room = 1 << 12
    while True:
        place, entries = room, {}
        for name, tensor in tensors.items():
            end = place + tensor.nbytes
            entries[name] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), place, end)
            place = -(-end // ALIGNMENT) * ALIGNMENT
        index = {"sources": key.sources, "packing": key.packing, "tensors": entries, "size": place}
        head = _MAGIC + json.dumps(index).encode() + b"\n"
        if len(head) <= room:
            break
        room *= 2
    file.write(head.ljust(room, b"\0"))
    for name, tensor in tensors.items():
        file.seek(entries[name][2])
        file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    file.truncate(place)


def _remove_stale(directory: Path) -> None:
    for path in directory.glob("*.hnetpacked"):
        try:
            with path.open("rb") as file:
                file.seek(len(_MAGIC))
                sources = json.loads(file.readline())["sources"]
            fresh = all(
                (stat := Path(name).stat()).st_size == size and stat.st_mtime_ns == time for name, size, time in sources
            )
        except (OSError, ValueError, KeyError):
            fresh = False
        if not fresh:
            path.unlink(missing_ok=True)
