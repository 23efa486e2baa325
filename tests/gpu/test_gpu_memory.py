"""How a GPU's memory is shared, and what is said where it is not enough; numbers alone."""

from __future__ import annotations

from math import prod

import pytest
import torch

from hnet_runtime.config import ModelConfig, official_names, tensor_shapes
from hnet_runtime.engine.config import EngineConfig, EngineError
from hnet_runtime.engine.gpu_memory import GpuMemory, MemoryPlan, check_weights, plan_memory, weight_bytes
from hnet_runtime.state.arenas import kv_bytes_per_position, state_bytes_per_row
from hnet_runtime.state.rows import PAGE

GIB = 1 << 30
H100 = 80 * GIB
BF16 = torch.bfloat16


def after_weights(config: ModelConfig, total: int, others: int = 0) -> GpuMemory:
    return GpuMemory(total, total - weight_bytes(config, BF16) - others)


def taken(config: ModelConfig, plan: MemoryPlan, length: int) -> int:
    rows = (plan.num_rows + 1) * state_bytes_per_row(config, BF16, length)
    keys = (plan.kv_positions + PAGE) * kv_bytes_per_position(config, BF16, length)
    return rows + keys + plan.prefix_cache_bytes


@pytest.mark.parametrize("name", official_names())
@pytest.mark.parametrize("total", [24 * GIB, 40 * GIB, H100, 141 * GIB])
@pytest.mark.parametrize("rows", [None, 16])
def test_what_is_given_is_there(name, total, rows):
    config, engine = ModelConfig.official(name), EngineConfig(max_num_seqs=rows)
    memory = after_weights(config, total)
    plan = plan_memory(config, BF16, engine, memory)
    assert taken(config, plan, engine.max_model_len) + weight_bytes(config, BF16) <= 0.9 * total
    assert plan.kv_positions >= engine.max_model_len
    assert plan.num_rows == rows or (rows is None and 1 <= plan.num_rows <= 256)


def test_weights_are_counted_as_they_are():
    config = ModelConfig.official("hnet_2stage_L")
    elements = sum(prod(shape) for shape in tensor_shapes(config).values())
    assert weight_bytes(config, torch.float32) == 4 * elements
    assert 2 * elements < weight_bytes(config, BF16) < 2.4 * elements


def test_fewer_rows_where_their_state_would_take_most_of_it():
    config = ModelConfig.official("hnet_1stage_XL")
    large = plan_memory(config, BF16, EngineConfig(), after_weights(config, H100))
    small = plan_memory(config, BF16, EngineConfig(), after_weights(config, 7 * GIB))
    assert small.num_rows < large.num_rows <= 256


def test_others_on_the_gpu_leave_less():
    config = ModelConfig.official("hnet_1stage_XL")
    alone = plan_memory(config, BF16, EngineConfig(max_num_seqs=64), after_weights(config, 40 * GIB))
    beside = plan_memory(config, BF16, EngineConfig(max_num_seqs=64), after_weights(config, 40 * GIB, 10 * GIB))
    assert beside.kv_positions <= alone.kv_positions
    assert beside.prefix_cache_bytes < alone.prefix_cache_bytes


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded():
    config = ModelConfig.official("hnet_2stage_XL")
    with pytest.raises(EngineError) as caught:
        check_weights(config, BF16, EngineConfig(), GpuMemory(3 * GIB, 3 * GIB - 300_000_000))
    message = str(caught.value)
    assert message.startswith("gpu_memory_utilization 0.9: the GPU has 3.00 GiB, 0.28 GiB of it taken")
    assert f"weights take {weight_bytes(config, BF16) / GIB:.2f} GiB" in message
    check_weights(config, BF16, EngineConfig(), GpuMemory(H100, H100))


def test_rows_and_keys_that_do_not_fit_are_refused_with_the_numbers():
    config = ModelConfig.official("hnet_1stage_XL")
    engine = EngineConfig(max_num_seqs=3000)
    with pytest.raises(EngineError) as caught:
        plan_memory(config, BF16, engine, after_weights(config, 24 * GIB))
    message = str(caught.value)
    per_row = state_bytes_per_row(config, BF16, engine.max_model_len)
    assert f"state of 3000 rows takes {3001 * per_row / GIB:.2f} GiB" in message
    assert "keys and values of one request of max_model_len 8192" in message
    assert "more than there is; lower max_num_seqs" in message
    assert "\n" not in message


def test_kv_memory_that_is_given_is_taken_or_refused():
    config = ModelConfig.official("hnet_1stage_XL")
    per_position = kv_bytes_per_position(config, BF16, 8192)
    chosen = EngineConfig(max_num_seqs=8, kv_memory=10_000 * per_position)
    assert plan_memory(config, BF16, chosen, after_weights(config, H100)).kv_positions == 10_000 // PAGE * PAGE
    for kv_memory in (100 * per_position, 100 * GIB):
        with pytest.raises(EngineError, match="kv_memory is"):
            plan_memory(config, BF16, EngineConfig(kv_memory=kv_memory), after_weights(config, H100))


@pytest.mark.parametrize("share", [0.0, 1.5, -1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(EngineError, match="gpu_memory_utilization"):
        EngineConfig(gpu_memory_utilization=share)
