"""Every kernel is compiled for GPUs that are not here, with a model's constants: nothing spills, and loads are wide."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from hnet_runtime.config import ModelConfig
from hnet_runtime.ops.triton import attention
from hnet_runtime.ops.triton.compiling import ARCHITECTURES, Compiled, compile_for
from hnet_runtime.ops.triton.launching import Launch, recording
from hnet_runtime.ops.triton.registry import distinct, every_launch, step_launches
from hnet_runtime.ops.triton.report import BEGIN, END, model_dtype

ROOT = Path(__file__).parents[2]
LAUNCHES = every_launch()
SAMPLES = {launch.name: launch for launch in sorted(LAUNCHES, key=model_dtype, reverse=True)}  # bf16 comes last

NARROW_LOADS = {
    "add_rms_norm": 0,
    "gated_norm_step": 0,
    "swiglu": 0,
    "conv_step": 1,  # the row
    "take_over": 1,  # the row
    "verdict": 1,  # whether it is the first
    "ema_step": 4,  # row, place, p, and whether a chunk opened
    "ssm_step": 7,  # row, four numbers of a head, and B and C, of which a thread has four channels: 64 bits in bf16
    "attend_piece": 3,  # row, position, page
    "combine_pieces": 11,  # position, and a maximum and a sum of each piece
    "rotate_and_keep": 14,  # position, slot, frequencies, and halves of heads as small as 16 channels
    "enter_step": 3,  # row, byte, and the byte drawn
    "resume_step": 1,  # the row
    "surface_step": 2,  # row, p
    "descend_step": 4,  # verdicts of all rows, and a row's own
    "park_step": 4,
    "places": 4,  # row, position, page: a lane each
    "ema_kept": 1,  # the row
    "draw_step": 19,  # flags, logits, and what each row asks for
    "smooth_spans": 20,
    "rotate_spans": 2,
    "carry_spans": 5,
    "convolve_spans": 33,
    "keep_spans": 5,
    "attend_spans": 22,
    "tile_products": 19,
    "tile_states": 18,
    "pass_states": 4,
    "tile_output": 29,
}
"""Loads of fewer than 128 bits a thread that a kernel has, at most: single numbers, and places of other numbers. What
there is much of (states, keys, channels) is loaded 128 bits at once."""

WITHOUT_WIDE_LOADS = {"draw_step"}  # a lane has one byte, or two


def check(compiled: Compiled) -> None:
    name = compiled.launch.name
    assert compiled.spill_bytes == 0
    assert sum(count for bits, count in compiled.loads.items() if bits < 128) <= NARROW_LOADS[name]
    if name not in WITHOUT_WIDE_LOADS:
        assert any(bits >= 128 for bits in compiled.loads)
    # What a program may have of an A100's shared memory, and the registers of a unit.
    assert compiled.shared_bytes <= 163 * 1024
    assert compiled.registers * 32 * compiled.launch.options["num_warps"] <= 65536


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: f"sm_{each}")
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_kernel_compiles_without_spills_and_with_wide_loads(name, architecture):
    check(compile_for(SAMPLES[name], architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: f"sm_{each}")
@pytest.mark.parametrize("name", ["draw_step", "enter_step"])
def test_warps_wait_before_a_number_that_each_has_read_is_overwritten(name, architecture):
    """What a row drew last, and its state: read by every warp for itself, and written by one of them. The interpreter,
    which runs a program's lanes together, cannot show what becomes of it otherwise."""
    compiled = compile_for(SAMPLES[name], architecture)
    assert compiled.launch.options["num_warps"] > 1
    assert compiled.barriers > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: f"sm_{each}")
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_kernel_compiles_with_the_constants_of_every_official_model(name, architecture):
    for launch in LAUNCHES:
        if launch.name == name:
            check(compile_for(launch, architecture))


def test_spills_and_narrow_loads_are_found_where_they_are():
    """A kernel told to hold too much in one warp, and one that is not told that its rows are aligned."""
    q, store = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((1, 16, 128), (64, 16, 128)))
    index = torch.empty(1, device="meta", dtype=torch.int64)
    with recording() as launches:
        attention.decode_attention(q, store, store, index, index, index[:, None], -1, None, 64)
    launch = launches[0]
    assert compile_for(launch, 90).spill_bytes == 0
    crowded = Launch(launch.kernel, launch.grid, launch.arguments, launch.constants, {**launch.options, "num_warps": 1})
    assert compile_for(crowded, 90).spill_bytes > 0
    apart = torch.empty(1 + store.numel(), device="meta", dtype=torch.bfloat16)[1:].view(store.shape)
    unaligned = {**launch.arguments, "k_store": apart}
    loads = compile_for(Launch(launch.kernel, launch.grid, unaligned, launch.constants, launch.options), 90).loads
    assert sum(count for bits, count in loads.items() if bits < 128) > NARROW_LOADS["attend_piece"]


def test_the_kernels_of_a_step_are_those_that_the_models_need():
    config = ModelConfig.official("hnet_2stage_XL")
    names = {launch.name for launch in step_launches(config, torch.bfloat16)}
    assert names == {
        "add_rms_norm",
        "attend_piece",
        "combine_pieces",
        "conv_step",
        "descend_step",
        "draw_step",
        "ema_kept",
        "ema_step",
        "enter_step",
        "gated_norm_step",
        "park_step",
        "places",
        "resume_step",
        "rotate_and_keep",
        "ssm_step",
        "surface_step",
        "swiglu",
        "take_over",
        "verdict",
    }


def test_launches_that_differ_in_what_is_compiled_are_listed_apart():
    launches = step_launches(ModelConfig.official("hnet_1stage_L"), torch.bfloat16)
    assert len(list(distinct([*launches, *launches]))) == len(launches)
    assert len({(launch.name, str(launch.constants)) for launch in launches}) == len(launches)


def test_the_table_in_the_documents_has_every_kernel():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| `(\w+)` \| (\w+) \|", text.partition(BEGIN)[2].partition(END)[0], re.MULTILINE)
    expected = sorted({(launch.name, model_dtype(launch)) for launch in LAUNCHES})
    assert sorted(written) == expected, "run python -m hnet_runtime.ops.triton.report docs/kernels.md"


@pytest.mark.parametrize("module", ["hnet_runtime.ops", "hnet_runtime.ops.triton", "hnet_runtime.engine.loop"])
def test_triton_is_not_imported_before_a_kernel_is_wanted(module):
    code = f"import sys, {module}; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
