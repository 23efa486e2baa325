"""The arenas: what a reset leaves, what they weigh, and that a row's memory is its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.state.arenas import (
    AttentionState,
    Mamba2State,
    ModelState,
    kv_bytes_per_position,
    state_bytes_per_row,
)
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots, pages_for

DTYPES = [torch.float32, torch.bfloat16]


def state_of(config: ModelConfig, *, num_rows: int = 4, kv_positions: int = 640, max_positions: int = 200, dtype=None):
    return ModelState(
        config,
        num_rows=num_rows,
        kv_positions=kv_positions,
        max_positions=max_positions,
        dtype=dtype or torch.float32,
        device=torch.device("cpu"),
    )


def row_tensors(state: ModelState, row: int) -> list[torch.Tensor]:
    """Everything of fixed size that a row remembers."""
    found = []
    for stage in state.stages:
        for layers in stage.stacks.values():
            found += [t[row] for layer in layers if isinstance(layer, Mamba2State) for t in (layer.conv, layer.ssm)]
        if stage.router is not None:
            found += [stage.router[row], stage.ema[row]]
    return found


def test_a_new_state_is_zero(generated):
    state = state_of(generated.config)
    assert all(not tensor.any() for stage in state.stages for tensor in stage.tensors())
    assert all(not stage.positions.any() for stage in state.stages)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of a process's memory")
def test_an_arena_takes_memory_only_where_it_is_written(golden_case):
    before = resident_bytes()
    state = state_of(golden_case("b_2stage").config, kv_positions=2**22, max_positions=2**12)
    assert state.nbytes > 2**29
    assert resident_bytes() - before < 2**26


def test_reset_makes_rows_as_if_they_had_never_run_and_leaves_others(generated):
    state = state_of(generated.config)
    for row in (1, 2, 3, 4):
        for tensor in row_tensors(state, row):
            tensor.fill_(float("nan") if row in (2, 4) else 1.0)
        for stage in state.stages:
            stage.positions[row] = 10 + row
    state.reset([4, 2])
    for row in (2, 4):
        assert all(not tensor.any() for tensor in row_tensors(state, row))
        assert all(stage.positions[row] == 0 for stage in state.stages)
    for row in (1, 3):
        assert all((tensor == 1.0).all() for tensor in row_tensors(state, row))
        assert all(stage.positions[row] == 10 + row for stage in state.stages)


def test_running_rows_write_nothing_into_rows_that_do_not_run(generated):
    model = HNet(generated.config, generated.weights)
    state = model.new_state(num_rows=4, kv_positions=640, max_positions=200)
    for row in (2, 4):
        for pool in state.page_pools:
            pool.reserve(row, 200)
    for begin in range(0, 90, 30):
        model.forward(state, [4, 2], [bytes(range(begin, begin + 30)), bytes(range(begin + 100, begin + 101))])
    for row in (0, 1, 3):
        assert all(not tensor.any() for tensor in row_tensors(state, row))
        assert all(stage.positions[row] == 0 for stage in state.stages)
    assert any(tensor.any() for tensor in row_tensors(state, 4)) or not row_tensors(state, 4)
    assert state.stages[0].positions[[2, 4]].tolist() == [3, 90]
    for stage in state.stages:
        slots = stage.slots
        for layers in stage.stacks.values():
            for layer in layers:
                if isinstance(layer, AttentionState):
                    if isinstance(slots, PagePool):
                        own = {int(page) for row in (2, 4) for page in slots.table[row] if page}
                        others = [page for page in range(slots.num_pages + 1) if page not in own]
                        assert not layer.k.view(-1, PAGE, *layer.k.shape[1:])[others].any()
                    else:
                        rings = layer.k.view(-1, slots.capacity, *layer.k.shape[1:])
                        assert not rings[[0, 1, 3]].any()
                        assert rings[[2, 4]].any()


def test_positions_of_a_stage_count_its_own_positions(make_named_case):
    case = make_named_case("three_routed_stages")
    model = HNet(case.config, case.weights)
    state = model.new_state(num_rows=1, kv_positions=256, max_positions=256)
    for pool in state.page_pools:
        pool.reserve(1, 256)
    seen = [0] * len(state.stages)
    for begin in range(0, 120, 8):
        forward = model.forward(state, [1], [bytes(range(begin, begin + 8))])
        seen[0] += 8
        for stage, said in enumerate(forward.verdicts, start=1):
            seen[stage] += int(said.boundary.sum())
        assert [int(stage.positions[1]) for stage in state.stages] == seen
    assert seen[0] > seen[1] > seen[2] > seen[3] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nbytes_is_the_sum_of_all_tensors(generated, dtype):
    state = state_of(generated.config, dtype=dtype)
    tensors = [tensor for stage in state.stages for tensor in stage.tensors()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)  # no memory is shared
    assert state.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_positions", [200, 8, 2000])
def test_a_row_more_costs_what_state_bytes_per_row_says(generated, dtype, max_positions):
    sizes = [state_of(generated.config, num_rows=n, max_positions=max_positions, dtype=dtype).nbytes for n in (3, 4)]
    assert sizes[1] - sizes[0] == state_bytes_per_row(generated.config, dtype, max_positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_positions", [200, 8, 2000])
def test_a_page_more_costs_what_kv_bytes_per_position_says(generated, dtype, max_positions):
    sizes = [
        state_of(generated.config, kv_positions=pages * PAGE, max_positions=max_positions, dtype=dtype).nbytes
        for pages in (5, 6)
    ]
    assert sizes[1] - sizes[0] == PAGE * kv_bytes_per_position(generated.config, dtype, max_positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_positions", [200, 8, 2000])
def test_rows_and_pages_are_all_the_memory_there_is(generated, dtype, max_positions):
    state = state_of(generated.config, num_rows=6, kv_positions=320, max_positions=max_positions, dtype=dtype)
    rows = 7 * state_bytes_per_row(generated.config, dtype, max_positions)  # row 0 with them
    pages = (pages_for(320) + 1) * PAGE * kv_bytes_per_position(generated.config, dtype, max_positions)
    assert state.nbytes == rows + pages


def test_windows_are_rings_and_full_attention_is_pages(make_named_case):
    state = state_of(make_named_case("equal_widths").config)  # windows −1, 5, −1; stage 0 has Mamba alone
    first, second, main = (stage.slots for stage in state.stages)
    assert first is None
    assert isinstance(second, RingSlots)
    assert second.capacity == 6
    assert isinstance(main, PagePool)
    assert state.page_pools == (main,)


def test_state_stays_in_float32_where_it_is_summed_up(make_named_case):
    state = state_of(make_named_case("three_routed_stages").config, dtype=torch.bfloat16)
    for stage in state.stages:
        for layers in stage.stacks.values():
            for layer in layers:
                if isinstance(layer, Mamba2State):
                    assert layer.ssm.dtype == torch.float32
                    assert layer.conv.dtype == torch.bfloat16
                else:
                    assert layer.k.dtype == layer.v.dtype == torch.bfloat16
        if stage.router is not None:
            assert stage.router.dtype == torch.bfloat16
            assert stage.ema.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_positions", [200, 8])
def test_a_saved_row_is_what_is_its_own_and_no_more(generated, dtype, max_positions):
    """Rings count by what is written in them; what a row waits with is left out unless it waits."""
    state = state_of(generated.config, num_rows=3, max_positions=max_positions, dtype=dtype)
    empty = state.save(2)
    assert empty.positions == (0,) * len(state.stages)
    for stage in state.stages:
        stage.positions[2] = max_positions
    full = state.save(2)
    parked = sum((stage.d_model * dtype.itemsize + 4) for stage in generated.config.stages if not stage.is_main)
    assert full.num_bytes == state.saved_bytes == state_bytes_per_row(generated.config, dtype, max_positions) - parked
    assert state.save(2, parked=True).num_bytes == full.num_bytes + parked
    assert empty.num_bytes <= full.num_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_loaded_is_the_row_that_was_saved(generated, dtype):
    state = state_of(generated.config, num_rows=3, max_positions=8, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for stage in state.stages:
        stage.positions[:] = [0, 3, 20, 1]
        for tensor in stage.tensors():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    others = {id(tensor): tensor[[0, 2, 3]].clone() for tensor in own_tensors(state)}
    saved = state.save(2, parked=True)
    state.load(1, saved)
    again = state.save(1, parked=True)
    assert torch.equal(again.data, saved.data)
    assert again.positions == saved.positions == (20,) * len(state.stages)
    assert all(torch.equal(tensor[[0, 2, 3]], others[id(tensor)]) for tensor in own_tensors(state))


def own_tensors(state: ModelState) -> list[torch.Tensor]:
    """Those that rows index."""
    return [tensor for stage in state.stages for tensor in stage.tensors() if len(tensor) == state.num_rows]


def test_a_page_is_copied_with_the_keys_and_values_of_all_layers(make_named_case):
    state = state_of(make_named_case("equal_widths").config, num_rows=3, kv_positions=4 * PAGE)
    (pages,) = state.pages
    layers = [layer for layers in state.stages[pages.stage].stacks.values() for layer in layers]
    kept = [each for layer in layers if isinstance(layer, AttentionState) for each in (layer.k, layer.v)]
    for number, tensor in enumerate(kept):
        tensor[PAGE : 2 * PAGE] = number + 1
    state.copy_page(pages.stage, 1, 3)
    for number, tensor in enumerate(kept):
        assert (tensor[3 * PAGE : 4 * PAGE] == number + 1).all()
        assert not tensor[2 * PAGE : 3 * PAGE].any()
    assert len(kept) >= 2
