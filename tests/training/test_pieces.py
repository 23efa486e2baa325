"""The trainer's bookkeeping: windows, rates, groups, settings, journal, marks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hnet_runtime.config import ModelConfig, tensor_shapes
from hnet_runtime.engine.messages import Chunk
from training.checkpoint import Counters
from training.initial import initial_parameters
from training.journal import Journal, read
from training.losses import losses, ratio_at
from training.optimizer import clip, decays, network_of, parameter_groups, rate_at
from training.parallel_ops import equal_spans
from training.samples import marked
from training.settings import Chunking, Optimizer, Schedule, SettingsError, load
from training.windows import BOS, IGNORED, Text, Windows

# ── windows ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.bin"
    path.write_bytes(b"".join(b"\xfe" + bytes([65 + i % 26]) * 37 + b"\xff" for i in range(60)))
    return path


def test_targets_are_the_bytes_after_and_never_a_bos(text_file) -> None:
    windows, targets = Windows(Text.of_bytes(text_file), 32, seed=3).batch(5, 7)
    assert (windows[:, 0] == BOS).all()
    kept = targets[:, :-1] != IGNORED
    assert torch.equal(windows[:, 1:][kept], targets[:, :-1][kept])
    assert (windows[:, 1:][~kept] == BOS).all()
    assert not (targets == BOS).any()


def test_an_epoch_takes_every_part_once(text_file) -> None:
    data = Windows(Text.of_bytes(text_file), 32, seed=3)
    places = [data._place(number) for number in range(data.per_epoch)]
    assert len(set(places)) == data.per_epoch
    assert np.diff(sorted(places)).tolist() == [32] * (data.per_epoch - 1)
    assert max(places) + 32 < text_file.stat().st_size
    again = [data._place(number) for number in range(data.per_epoch, 2 * data.per_epoch)]
    assert again != places


def test_a_window_depends_on_its_number_and_the_seed_alone(text_file) -> None:
    one, two = Windows(Text.of_bytes(text_file), 32, seed=3), Windows(Text.of_bytes(text_file), 32, seed=3)
    two.batch(70, 3)
    assert torch.equal(one.batch(12, 4)[0][1:3], two.batch(13, 2)[0])
    assert not torch.equal(one.batch(12, 4)[0], Windows(Text.of_bytes(text_file), 32, seed=4).batch(12, 4)[0])


def test_a_file_too_short_for_a_window_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "short.bin").write_bytes(b"\xfeshort\xff")
    with pytest.raises(ValueError, match=r"short\.bin: 7 symbols are too few for windows of 32"):
        Windows(Text.of_bytes(tmp_path / "short.bin"), 32, seed=1)


# ── rates, groups, clipping ───────────────────────────────────────────────────────────────────


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(total=1000, warmup=100, decay=200, floor=0.1)
    assert rate_at(schedule, 49) == pytest.approx(0.5)
    assert [rate_at(schedule, seen) for seen in (100, 500, 800)] == [1.0, 1.0, 1.0]
    assert rate_at(schedule, 900) == pytest.approx(0.55)
    assert rate_at(schedule, 1000) == pytest.approx(0.1)


@pytest.fixture
def two_stage() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "arch_layout": ["m1", ["T1m1", ["T2"], "m1"], "m1"],
            "d_model": [64, 96, 128],
            "d_intermediate": [0, 128, 128],
            "ssm_cfg": {"d_conv": 4, "d_state": 8, "expand": 2},
            "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [16, 16, 16], "window_size": [-1, -1, -1]},
        }
    )


def test_every_parameter_is_in_one_group_with_its_stages_rate_and_its_decay(two_stage) -> None:
    parameters = initial_parameters(two_stage, 1)
    settings = Optimizer(learning_rate=1e-3, multipliers=[1.0, 0.5, 0.25], router_multiplier=0.1, weight_decay=0.2)
    found = {}
    for group in parameter_groups(two_stage, parameters, settings):
        for key, parameter in zip(group["names"], group["params"], strict=True):
            assert key not in found
            assert parameter is parameters[key]
            found[key] = (group["multiplier"], group["weight_decay"])
    assert found.keys() == parameters.keys()
    inner = "backbone.main_network"
    for key, wanted in {
        "embeddings.weight": (1.0, 0.0),
        "lm_head.weight": (1.0, 0.2),
        "backbone.encoder.layers.0.mixer.in_proj.weight": (1.0, 0.2),
        "backbone.encoder.layers.0.mixer.A_log": (1.0, 0.0),
        "backbone.encoder.layers.0.mixer.norm.weight": (1.0, 0.0),
        "backbone.routing_module.q_proj_layer.weight": (0.1, 0.2),
        "backbone.residual_proj.bias": (1.0, 0.0),
        f"{inner}.pad_dimension": (0.5, 0.0),
        f"{inner}.routing_module.k_proj_layer.weight": (0.05, 0.2),
        f"{inner}.main_network.main_network.layers.1.mlp.fc1.weight": (0.25, 0.2),
        f"{inner}.main_network.main_network.rmsnorm.weight": (0.25, 0.0),
    }.items():
        assert found[key] == pytest.approx(wanted), key


def test_every_parameter_has_a_network(two_stage) -> None:
    networks = network_of(two_stage)
    assert networks.keys() == tensor_shapes(two_stage).keys()
    assert set(networks.values()) == {
        *("embeddings", "head", "encoder0", "decoder0", "router0", "residual0"),
        *("encoder1", "decoder1", "router1", "residual1", "main2"),
    }


def test_clipping_holds_all_together_or_each_network_and_says_what_they_were() -> None:
    networks = {"a": "encoder0", "b": "encoder0", "c": "main1"}

    def gradients() -> dict[str, torch.Tensor]:
        return {"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "c": torch.tensor([0.5])}

    whole = gradients()
    assert clip(whole, networks, Optimizer(clip=1.0)) == pytest.approx({"encoder0": 5.0, "main1": 0.5})
    assert math.hypot(*(float(each) for each in whole.values())) == pytest.approx(1.0)
    each = gradients()
    clip(each, networks, Optimizer(clip=1.0, clip_each_network=True))
    assert [float(each[key]) for key in "abc"] == pytest.approx([0.6, 0.8, 0.5])


def test_matrices_decay_and_nothing_else(two_stage) -> None:
    for key, shape in tensor_shapes(two_stage).items():
        matrix = len(shape) == 2 and not key.startswith("embeddings")
        assert decays(key) == matrix, key


# ── what a model begins as ────────────────────────────────────────────────────────────────────


def test_a_model_begins_as_the_paper_says(two_stage) -> None:
    parameters = initial_parameters(two_stage, 1)
    assert {key: tuple(tensor.shape) for key, tensor in parameters.items()} == tensor_shapes(two_stage)
    assert torch.equal(parameters["backbone.routing_module.q_proj_layer.weight"], torch.eye(64))
    assert not parameters["backbone.main_network.residual_proj.weight"].any()
    assert (parameters["backbone.encoder.rmsnorm.weight"] == 1).all()
    step = torch.nn.functional.softplus(parameters["backbone.encoder.layers.0.mixer.dt_bias"])
    assert (step > 0.9e-3).all()
    assert (step < 1.1e-1).all()
    first, other = (initial_parameters(two_stage, seed)["lm_head.weight"] for seed in (1, 2))
    assert torch.equal(first, parameters["lm_head.weight"])
    assert not torch.equal(first, other)


# ── ratios and guidance ───────────────────────────────────────────────────────────────────────


def test_a_ratio_is_led_from_its_start() -> None:
    chunking = Chunking(ratio=[6.0], start=[2.0], annealing=100)
    assert [ratio_at(chunking, 0, seen) for seen in (0, 50, 100, 900)] == [2.0, 4.0, 6.0, 6.0]
    assert ratio_at(Chunking(ratio=[6.0]), 0, 0) == 6.0


def test_guidance_costs_less_where_chunks_open_at_white_space() -> None:
    from training.forward import Forwarded, Route

    text = torch.tensor([[BOS, *b"a word or two"]])
    spans = equal_spans(1, text.shape[1], torch.device("cpu"))
    logits = torch.zeros(1, text.shape[1], 256)

    def cost(opens: set[int]) -> float:
        p = torch.tensor([0.9 if place in opens else 0.1 for place in range(text.shape[1])])
        route = Route(spans, spans, p, (p > 0.5).numpy(), np.arange(text.shape[1]))
        chunking = Chunking(ratio=[4.0], alpha=0.0, guidance=1.0)
        return float(losses(Forwarded(logits, (route,)), text, text, chunking, 0).total)

    spaces = {2, 7, 10}
    assert cost(spaces) < cost({3, 8, 11}) < cost({1, 3, 4, 5, 6, 8, 9})


# ── settings ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"micro": 3}, r"batch: windows \(4\) must be a multiple of processes × micro \(1 × 3\)"),
        ({"ratio": [4.0, 4.0]}, "chunking.ratio: one number for each routed stage, which is 1, not 2"),
        ({"multipliers": [1.0]}, "optimizer.multipliers: one number for each stage, which is 2, not 1"),
        ({"total": 1000}, r"schedule: warmup and decay \(1024 \+ 1024\) are more than total \(1000\)"),
        ({"widths": [64, 32]}, "model: d_model"),
        ({"evaluate": 0}, "reporting.evaluate: Input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_setting(make_settings, change, said) -> None:
    with pytest.raises(SettingsError, match=r"settings\.toml: " + said) as error:
        load(make_settings(**change))
    assert "\n" not in str(error.value)


def test_unknown_settings_missing_files_and_broken_toml_are_named(make_settings, tmp_path) -> None:
    path = make_settings()
    sound = path.read_text()
    path.write_text(sound + "speed = 3\n")
    with pytest.raises(SettingsError, match=r"reporting\.speed"):
        load(path)
    path.write_text(sound.replace("heldout.bin", "nowhere.bin"))
    with pytest.raises(SettingsError, match=r"no such file: .*nowhere\.bin"):
        load(path)
    path.write_text("[model")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        load(tmp_path / "none.toml")


# ── journal and marks ─────────────────────────────────────────────────────────────────────────


def test_a_journal_that_goes_on_drops_what_came_after_its_state(tmp_path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path, Counters(0, 0, 0.0, {}), 10**6, 65_536, said.append)
    for step in range(1, 5):
        journal.step(Counters(step, step * 65_536, 0.0, {}), {"bits_per_byte": float(step), "norms": {"main1": 1.0}})
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a kill while it was written
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4]
    Journal(tmp_path, Counters(2, 2 * 65_536, 0.0, {}), 10**6, 65_536, said.append)
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    assert read(tmp_path)[0]["norms.main1"] == 1.0
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["bytes_per_second"] > 0
    assert len(said) == 4


def test_marks_stand_where_chunks_open_one_for_each_stage() -> None:
    data = b"\xfeab\xc3\xa9 cd"
    chunks = [Chunk(1, 0, 1.0), Chunk(1, 2, 0.9), Chunk(1, 4, 0.8), Chunk(1, 6, 0.7), Chunk(2, 6, 0.6)]
    assert marked(data, chunks) == "a|b|é ||cd"
