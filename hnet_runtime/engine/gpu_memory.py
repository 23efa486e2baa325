"""Who gets how much of a GPU's memory: weights, rows, keys and values, kept prefixes, and what runs need beside them.

Knows numbers of bytes; no device and no tensors but their dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hnet_runtime.config import ModelConfig
from hnet_runtime.engine.config import EngineConfig, EngineError
from hnet_runtime.state.arenas import kv_bytes_per_position, state_bytes_per_row
from hnet_runtime.state.rows import PAGE

DEFAULT_ROWS = 256
_WORKING_SHARE = 0.04  # of all memory: graphs, prompts on their way, libraries' workspaces
_STATE_SHARE = 0.5  # of what weights leave, at most, where the number of rows is not given
_CACHE_SHARE, _CACHE_MOST = 0.125, 8 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Rows, KV positions of each full-attention stage, and bytes for snapshots of prefixes."""

    num_rows: int
    kv_positions: int
    prefix_cache_bytes: int


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU in all, and those that are free."""

    total: int
    free: int

    def usable(self, share: float) -> int:
        """Of `share` of it, what is not taken, by whomever, and not needed to run."""
        return int(self.total * (share - _WORKING_SHARE)) - (self.total - self.free)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What loaded weights take, as `hierarchy.HNet` keeps them: routers' and residual projections in fp32 as well."""
    routed = sum(3 * stage.d_model**2 for stage in config.stages if not stage.is_main)
    return config.num_parameters * dtype.itemsize + (routed * 4 if dtype != torch.float32 else 0)


def check_weights(config: ModelConfig, dtype: torch.dtype, engine: EngineConfig, memory: GpuMemory) -> None:
    """EngineError if weights alone are more than there is, before hours are spent on loading them."""
    wanted, usable = weight_bytes(config, dtype), memory.usable(engine.gpu_memory_utilization)
    if wanted > usable:
        raise EngineError(
            f"gpu_memory_utilization {engine.gpu_memory_utilization}: {_told(memory, engine)}; weights take "
            f"{_size(wanted)}, {_size(wanted - usable)} more than there is: raise it, or take a larger GPU"
        )


def plan_memory(config: ModelConfig, dtype: torch.dtype, engine: EngineConfig, memory: GpuMemory) -> MemoryPlan:
    """Shares what is usable once the weights are loaded. EngineError, with the numbers, where it is not enough for one
    request of max_model_len at a chunk a byte, which is possible."""
    usable = memory.usable(engine.gpu_memory_utilization)
    per_row = state_bytes_per_row(config, dtype, engine.max_model_len)
    per_position = kv_bytes_per_position(config, dtype, engine.max_model_len)
    longest = -(-engine.max_model_len // PAGE) * PAGE
    kept = (longest + PAGE) * per_position  # for one request whatever else; page 0 is padding's
    num_rows = engine.max_num_seqs
    if num_rows is None:
        most = min(int(usable * _STATE_SHARE), usable - kept)
        num_rows = max(min(DEFAULT_ROWS, most // max(per_row, 1) - 1), 1)
    state = (num_rows + 1) * per_row
    cache = engine.prefix_cache_memory
    if cache is None:
        cache = max(min(int(usable * _CACHE_SHARE), _CACHE_MOST, usable - state - kept), 0)
    left = usable - state - cache - PAGE * per_position
    budget = left if engine.kv_memory is None else engine.kv_memory
    positions = num_rows * longest
    if per_position:
        positions = min(positions, max(budget, 0) // per_position // PAGE * PAGE)
    missing = max(longest * per_position, 0 if engine.kv_memory is None else engine.kv_memory) - left
    if positions < engine.max_model_len or missing > 0:
        raise EngineError(
            f"gpu_memory_utilization {engine.gpu_memory_utilization}: {_told(memory, engine)}; state of {num_rows} "
            f"rows takes {_size(state)} ({_size(per_row)} a row), kept prefixes {_size(cache)}, keys and values of one "
            f"request of max_model_len {engine.max_model_len} {_size(longest * per_position)}"
            + (f", kv_memory is {_size(engine.kv_memory)}" if engine.kv_memory is not None else "")
            + (f": {_size(missing)} more than there is" if missing > 0 else "")
            + "; lower max_num_seqs, max_model_len or prefix_cache_memory, or raise the share"
        )
    return MemoryPlan(num_rows, positions, cache)


def _told(memory: GpuMemory, engine: EngineConfig) -> str:
    usable = memory.usable(engine.gpu_memory_utilization)
    return (
        f"the GPU has {_size(memory.total)}, {_size(memory.total - memory.free)} of it taken (weights that are loaded "
        f"included), and with {_size(int(memory.total * _WORKING_SHARE))} to work in {_size(max(usable, 0))} are left"
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"
