"""What a model directory looks like: which of its files hold the weights.

Knows file names and the index of sharded safetensors. Opens no weight file.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from hnet_runtime.checkpoint.errors import CheckpointError

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "model.pt"
WEIGHT_SUFFIXES = (".safetensors", ".pt")


def weight_names(names: Collection[str], where: str) -> tuple[str, ...]:
    """Which of a directory's files hold the weights: safetensors before pickles, the index for shards.

    With an index, the index itself is returned; the shards are whatever it lists.
    """
    for name in (SAFETENSORS_NAME, INDEX_NAME):
        if name in names:
            return (name,)
    for suffix, usual in ((".safetensors", SAFETENSORS_NAME), (".pt", PICKLE_NAME)):
        found = sorted(name for name in names if name.endswith(suffix))
        if usual in found or len(found) == 1:
            return (usual if usual in found else found[0],)
        if found:
            raise CheckpointError(
                f"{where}: holds {len(found)} {suffix} files ({found[0]}, {found[1]}, …)"
                f" and neither {usual} nor {INDEX_NAME}; name one file"
            )
    raise CheckpointError(f"{where}: no weights there, neither *.safetensors nor *.pt")


def expand_index(directory: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """Paths of weight files; an index is replaced by the shards it lists, in order."""
    if names != (INDEX_NAME,):
        return tuple(directory / name for name in names)
    index = directory / INDEX_NAME
    shards = shard_names(index)
    for shard in shards:
        if not (directory / shard).is_file():
            raise CheckpointError(f"{index}: lists {shard}, which is not there")
    return tuple(directory / shard for shard in shards)


def shard_names(index: Path) -> tuple[str, ...]:
    """The weight files that a `model.safetensors.index.json` lists, in order, each once."""
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index}: not valid JSON: {error}") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' of keys to files")
    for key, shard in weight_map.items():
        # A plain file name: an index must not reach outside its own directory.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map[{key!r}] is {shard!r}, not the name of a .safetensors file")
    return tuple(sorted(set(weight_map.values())))
