"""The paper roofline: what a step reads, by hand and by the model's own tensors; what it launches; what follows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from hnet_runtime.config import VOCAB_SIZE, ModelConfig, official_names, tensor_shapes
from hnet_runtime.engine.gpu_memory import weight_bytes
from hnet_runtime.engine.graphs import Eager, StepGraphs, buckets
from hnet_runtime.gpu_roofline import (
    BYTES_PER_CHUNK,
    H100,
    H200,
    Gpu,
    Shapes,
    Traffic,
    aligned_rate,
    boundary_rates,
    expected_rate,
    lockstep_rate,
    step_seconds,
)
from hnet_runtime.model.captured import CapturedHNet, StepKey, step_kinds
from hnet_runtime.state.arenas import kv_bytes_per_position, state_bytes_per_row
from tests.benchmarks.conftest import TINY

PAGE = Path(__file__).parents[2] / "docs" / "gpu-model.md"
FLAT = {  # one Mamba-2 layer around one layer of attention, widths that a hand can multiply
    "arch_layout": ["m1", ["t1"], "m1"],
    "d_model": [64, 64],
    "d_intermediate": [0, 0],
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 32, "expand": 2},
    "attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [16, 16], "window_size": [-1, -1]},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
POLICIES = ("lockstep", "aligned")


def twenty(kind: tuple[int, bool], rows: int) -> int:
    return 20


def test_a_small_step_is_what_a_hand_computes():
    config = ModelConfig.from_dict(FLAT)
    found = Shapes(config, (0.25,), context=400).traffic((0, False), rows=3, bucket=4)
    mamba = (2 * 128 + 2 * 32 + 2) * 64 + 64 * 128  # in_proj, out_proj
    attention = 3 * 64 * 64 + 64 * 64
    matrices = 2 * mamba + attention + 256 * 64
    assert found.weights == 2 * (matrices + 3 * 64)  # and the embeddings of three bytes
    small = 3 * 2 + 192 * 4 + 192 + 128 + 64  # of a Mamba-2 layer: dt, A, D; convolution and its bias; two norms
    vectors = 2 * small + 64 + 3 * 64 + 64  # the other layer's norm, three at the ends of stacks, a bias
    assert found.fp32_weights == 4 * (3 * 64 * 64 + vectors)
    assert found.flops == 2 * 4 * matrices
    assert found.fp32_flops == 2 * 4 * 3 * 64 * 64
    ssm, conv = 128 * 32 * 4, 3 * 192 * 2
    assert found.state == 3 * (2 * 2 * (ssm + conv) + 2 * 64 * 2 + 2 * 64 * 4)
    assert found.kv == 3 * 0.25 * 2 * 64 * 2 * (100 + 1)  # a hundred chunks read, one written


def test_a_step_that_parks_leaves_out_what_it_does_not_run():
    shapes = Shapes(ModelConfig.from_dict(FLAT), (0.25,))
    through, byte, main = (shapes.traffic(kind, 8) for kind in ((0, False), (0, True), (1, False)))
    assert byte.kv == 0
    assert byte.weights < through.weights
    assert main.kv == 4 * through.kv  # all eight rows, of which a quarter is due otherwise
    decoder_and_head = byte.weights + main.weights - through.weights
    assert 0 < decoder_and_head < byte.weights


def test_a_window_bounds_the_keys_that_are_read():
    windowed = {**FLAT, "attn_cfg": {**FLAT["attn_cfg"], "window_size": [-1, 15]}}
    kv = [Shapes(ModelConfig.from_dict(windowed), (0.25,), context).traffic((1, False), 1).kv for context in (40, 4000)]
    assert kv == [2 * 64 * 2 * (10 + 1), 2 * 64 * 2 * (16 + 1)]


@pytest.mark.parametrize("name", official_names())
def test_weights_of_a_step_are_the_loaded_models_own_tensors(name):
    config = ModelConfig.official(name)
    rates = boundary_rates(config)
    weights = {
        key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in tensor_shapes(config).items()
    }
    constants = CapturedHNet(config, weights, lambda: StepGraphs(Eager())).constants()
    found = Shapes(config, rates).traffic((0, False), 1)
    # Of the embeddings a step reads one row.
    unread = (VOCAB_SIZE - 1) * config.d_model * 2
    assert found.weights + found.fp32_weights + unread == sum(each.numel() * each.itemsize for each in constants)


@pytest.mark.parametrize(
    ("name", "parameters", "gib"),
    [
        ("hnet_1stage_L", 0.68, 1.27),
        ("hnet_1stage_XL", 1.27, 2.37),
        ("hnet_2stage_L", 0.87, 1.63),
        ("hnet_2stage_XL", 1.60, 2.99),
        ("hnet_2stage_XL_chinese", 1.76, 3.27),
        ("hnet_2stage_XL_code", 1.65, 3.08),
    ],
)
def test_a_step_reads_a_checkpoint_and_what_is_kept_wider(name, parameters, gib):
    """The sizes are those of docs/deploy.md: all parameters in bfloat16."""
    config = ModelConfig.official(name)
    assert config.num_parameters / 1e9 == pytest.approx(parameters, abs=0.006)
    assert 2 * config.num_parameters / 2**30 == pytest.approx(gib, abs=0.006)
    read = Shapes(config, boundary_rates(config)).traffic((0, False), 1)
    stored = 2 * config.num_parameters
    assert read.weights + read.fp32_weights < weight_bytes(config, torch.bfloat16)
    assert 0.99 < (read.weights + read.fp32_weights) / stored < 1.05


@pytest.mark.parametrize("name", official_names())
def test_state_and_keys_of_a_step_are_those_that_arenas_hold(name):
    """At a chunk a byte every row's whole state is read and written, and every key is read."""
    config, context = ModelConfig.official(name), 4096
    found = Shapes(config, (1.0,) * config.num_routed_stages, context).traffic((0, False), 1)
    rings = parked = ring_keys = 0
    for stage in config.stages:
        parked += 0 if stage.is_main else 2 * stage.d_model + 4
        layers = sum(layer.mixer == "attention" for stack in stage.stacks for layer in stack.layers)
        if stage.attention is not None and stage.attention.window >= 0:
            position = layers * 2 * stage.d_model * 2
            rings += position * (stage.attention.window + 1)
            ring_keys += position * (stage.attention.window + 2)
    assert found.state == 2 * (state_bytes_per_row(config, torch.bfloat16, 8192) - rings - parked)
    assert found.kv == (context + 1) * kv_bytes_per_position(config, torch.bfloat16, 8192) + ring_keys


def test_seconds_are_those_of_the_slower_of_memory_and_products_and_of_launches():
    gpu = Gpu("", bandwidth=10.0, bf16=100.0, fp32=10.0)
    assert step_seconds(Traffic(weights=20, state=10, kv=20, flops=100), 0, gpu) == pytest.approx(2 + 1 + 2)
    assert step_seconds(Traffic(weights=20, flops=400), 0, gpu) == pytest.approx(4)
    assert step_seconds(Traffic(fp32_weights=20, fp32_flops=50), 3, gpu, 0.5) == pytest.approx(5 + 1.5)


@pytest.mark.parametrize("name", official_names())
def test_rates_rise_with_rows_and_waiting_never_costs(name):
    config = ModelConfig.official(name)
    rates = {
        policy: [expected_rate(config, rows, policy=policy, launches=twenty) for rows in ROWS] for policy in POLICIES
    }
    for found in rates.values():
        assert found == sorted(found)
    assert all(aligned >= lock for lock, aligned in zip(rates["lockstep"], rates["aligned"], strict=True))
    for rows, rate in zip(ROWS, rates["lockstep"], strict=True):
        assert rate <= rows * rates["lockstep"][0] * (1 + 1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_more_bandwidth_helps_at_most_in_proportion(policy, rows):
    config = ModelConfig.official("hnet_2stage_XL")
    slow, fast = (
        expected_rate(config, rows, bandwidth=gpu.bandwidth, policy=policy, launches=twenty) for gpu in (H100, H200)
    )
    assert 1 < fast / slow < H200.bandwidth / H100.bandwidth


def test_launches_cost_what_is_assumed_of_them():
    config = ModelConfig.from_dict(FLAT)
    free, paid = (expected_rate(config, 4, launches=twenty, launch_seconds=seconds) for seconds in (0.0, 1e-3))
    assert 4 / paid - 4 / free == pytest.approx(20 * 1e-3)


def test_longer_chunks_and_shorter_contexts_are_faster_where_rows_wait():
    config = ModelConfig.official("hnet_1stage_XL")

    def rate(chunk: float, context: int) -> float:
        return expected_rate(config, 16, policy="aligned", bytes_per_chunk=[chunk], context=context, launches=twenty)

    assert rate(2.0, 2048) < rate(4.0, 2048) < rate(8.0, 2048)
    assert rate(4.0, 8192) < rate(4.0, 1024)


def test_where_every_byte_opens_a_chunk_one_row_waits_for_nothing_but_another_step():
    config = ModelConfig.from_dict(FLAT)
    shapes = Shapes(config, (1.0,))
    both = sum(step_seconds(shapes.traffic(kind, 1), 20, H100, 1e-6) for kind in ((0, True), (1, False)))
    assert aligned_rate(shapes, 1, H100, twenty, 1e-6) == pytest.approx(1 / both)


def test_a_model_without_routers_has_one_rate():
    config = ModelConfig.from_dict({**FLAT, "arch_layout": ["m2"], "d_model": [64], "d_intermediate": [0]})
    shapes = Shapes(config, boundary_rates(config))
    assert aligned_rate(shapes, 4, H100, twenty, 1e-6) == pytest.approx(lockstep_rate(shapes, 4, H100, twenty, 1e-6))


def test_chunk_lengths_are_of_the_main_network_or_of_every_stage():
    config = ModelConfig.from_dict(TINY)
    assert math.prod(boundary_rates(config)) == pytest.approx(1 / BYTES_PER_CHUNK[2])
    assert boundary_rates(config, [4.0, 2.0]) == (0.25, 0.5)
    with pytest.raises(ValueError, match="3 chunk lengths for 2 routed stages"):
        boundary_rates(config, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least one position"):
        boundary_rates(config, [0.5])
    with pytest.raises(ValueError, match="at least one decodes"):
        expected_rate(config, 0, launches=twenty)


# ── launches ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tape():
    pytest.importorskip("triton")
    from hnet_runtime import gpu_tape

    return gpu_tape.tape


def test_a_tape_lists_the_layers_of_a_step(tape):
    found = tape(ModelConfig.from_dict(FLAT), StepKey(2, 0, False))
    assert (found.ours["ssm_step"], found.ours["conv_step"], found.ours["gated_norm_step"]) == (2, 2, 2)
    assert found.ours["rotate_and_keep"] == 1
    assert found.ours["add_rms_norm"] == 3 + 3  # before each layer, and at the end of each stack
    assert found.products == 3 * 2 + 3 + 1  # two a layer, the router's two and the residual's, the head
    assert found.others == 0  # what moves numbers around boundaries is in kernels of ours


@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("name", ["hnet_1stage_L", "hnet_2stage_XL"])
def test_the_page_in_docs_says_what_a_step_launches_now(tape, name, parks):
    found = tape(ModelConfig.official(name), StepKey(2, 0, parks))
    kind = "opening rows wait" if parks else "on"
    numbers = f"{found.launches} | {sum(found.ours.values())} | {found.products} | {found.others}"
    said = PAGE.read_text(encoding="utf-8")
    line = re.search(rf"^\| {name} \| stage 0.* {kind} \| (.*) \|$", said, re.MULTILINE)
    assert line is not None
    assert line[1] == numbers, "run hnet bench gpu-model --report docs/gpu-model.md"


@pytest.mark.parametrize("name", official_names())
def test_launches_do_not_depend_on_rows_but_on_the_kind_of_step(tape, name):
    config = ModelConfig.official(name)
    for kind in step_kinds(len(config.stages)):
        assert tape(config, StepKey(2, *kind)) == tape(config, StepKey(128, *kind))
    byte, through = (tape(config, StepKey(2, 0, parks)).launches for parks in (True, False))
    assert 0 < 2 * byte < through


def test_the_default_counts_launches_itself(tape):
    config = ModelConfig.from_dict(TINY)
    counted = expected_rate(config, 4)
    through = tape(config, StepKey(2, 0, False)).launches
    assert counted == pytest.approx(expected_rate(config, 4, launches=lambda kind, rows: through))


# ── the command ───────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_a_page_and_figures_that_say_what_they_are(tape, tmp_path, capsys):
    from benchmarks import gpu_model

    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(TINY), encoding="utf-8")
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    arguments = ["--model", str(model), "--rows", "1,8", "--report", str(page), "--json", str(figures)]
    gpu_model.main([*arguments, "--bytes-per-chunk", "2,3", "--launch-us", "1", "--context", "100"])
    written = page.read_text(encoding="utf-8")
    assert "computed, not measured" in written
    assert "6.0 bytes a chunk of the main network" in written
    assert "computed, not measured" in " ".join(capsys.readouterr().out.split())
    rows = {row["name"]: row for row in json.loads(figures.read_text(encoding="utf-8"))["rows"]}
    config = ModelConfig.from_dict(TINY)
    for gpu in (H100, H200):
        for policy in POLICIES:
            expected = expected_rate(
                config,
                8,
                bandwidth=gpu.bandwidth,
                policy=policy,
                bytes_per_chunk=[2.0, 3.0],
                context=100,
                launch_seconds=1e-6,
            )
            assert rows[f"tiny {gpu.name} rows=8 {policy}"]["value"] == pytest.approx(expected)


def test_the_page_in_docs_has_every_official_model_and_bucket():
    written = PAGE.read_text(encoding="utf-8")
    assert "computed, not measured" in written
    for name in official_names():
        for gpu in (H100, H200):
            part = written.split(f"## {name} on {gpu.name},")[1].split("\n## ")[0]
            assert [int(line.split("|")[1]) for line in part.splitlines() if re.match(r"\| \d", line)] == buckets(
                128, 128
            )
