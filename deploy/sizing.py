"""`python -m deploy.sizing`: what each official model takes of memory, as the table of docs/deploy.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hnet_runtime.config import ModelConfig, official_names
from hnet_runtime.state.arenas import kv_bytes_per_position, state_bytes_per_row

MODEL_LENGTH = 8192  # bytes of prompt and completion
BYTES_PER_CHUNK = 6  # of the main network, as of common text; hnet_bytes_per_chunk has that of yours
GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
GPU_MEMORY = 80e9
KV_SHARE = 0.75  # of what the weights leave: the engine's default; the rest is for states, prefixes and activations


def table() -> Iterator[str]:
    """Lines of Markdown, all in bfloat16."""
    yield "| model | parameters | weights | state a row | KV a chunk | KV of 8192 bytes | rows on 80 GB |"
    yield "|---|---|---|---|---|---|---|"
    for name in official_names():
        config = ModelConfig.official(name)
        weights = config.num_parameters * torch.bfloat16.itemsize
        state = state_bytes_per_row(config, torch.bfloat16, MODEL_LENGTH)
        per_chunk = kv_bytes_per_position(config, torch.bfloat16, MODEL_LENGTH)
        most = per_chunk * MODEL_LENGTH
        rows = [int((GPU_MEMORY - weights) * KV_SHARE / kv) for kv in (most / BYTES_PER_CHUNK, most)]
        cells = (
            f"`{name}`",
            f"{config.num_parameters / 1e9:.2f} G",
            f"{weights / GIB:.2f} GiB",
            f"{state / MIB:.1f} MiB",
            f"{per_chunk / KIB:.0f} KiB",
            f"{most / BYTES_PER_CHUNK / MIB:.0f} to {most / MIB:.0f} MiB",
            f"{rows[0]} to {rows[1]}",
        )
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
