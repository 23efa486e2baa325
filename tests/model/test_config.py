"""The official JSON flattened into stages: what it becomes, what it counts, what it refuses."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet_runtime.config import (
    ConfigError,
    LayerConfig,
    ModelConfig,
    official_names,
    stage_tensor_shapes,
    tensor_shapes,
)

MAMBA, MAMBA_MLP = LayerConfig("mamba2", False), LayerConfig("mamba2", True)
ATTENTION, ATTENTION_MLP = LayerConfig("attention", False), LayerConfig("attention", True)
LETTERS = {"m": MAMBA, "M": MAMBA_MLP, "t": ATTENTION, "T": ATTENTION_MLP}

OFFICIAL_PARAMETERS = {
    "hnet_1stage_L": 679_405_312,
    "hnet_1stage_XL": 1_270_833_920,
    "hnet_2stage_L": 874_315_264,
    "hnet_2stage_XL": 1_603_492_224,
    "hnet_2stage_XL_chinese": 1_755_285_888,
    "hnet_2stage_XL_code": 1_654_090_112,
}


def stacks_of(config):
    """[(encoder layers, decoder layers) …, (main layers,)]"""
    return [tuple(stack.layers for stack in stage.stacks) for stage in config.stages]


# ── the six published models ──────────────────────────────────────────────────────────────────


def test_the_six_published_configurations_ship_with_the_package():
    assert official_names() == tuple(sorted(OFFICIAL_PARAMETERS))


@pytest.mark.parametrize("name", sorted(OFFICIAL_PARAMETERS))
def test_a_published_configuration_has_the_published_number_of_parameters(name):
    config = ModelConfig.official(name)
    assert config.num_parameters == OFFICIAL_PARAMETERS[name]
    assert config.num_routed_stages == int(name[5])
    assert config.d_model == 1024
    assert config.embedding_parameters == 2 * 256 * 1024


def test_the_two_stage_XL_model_is_laid_out_as_published():
    config = ModelConfig.official("hnet_2stage_XL")
    outer, middle, main = config.stages
    assert stacks_of(config) == [
        ((MAMBA,) * 4, (MAMBA,) * 4),
        ((ATTENTION_MLP, *(MAMBA,) * 4), (*(MAMBA,) * 4, ATTENTION_MLP)),
        ((ATTENTION_MLP,) * 27,),
    ]
    assert [stage.d_model for stage in config.stages] == [1024, 1536, 2048]
    assert [stage.d_outer for stage in config.stages] == [1024, 1024, 1536]
    assert [stage.pad_width for stage in config.stages] == [0, 512, 512]
    assert [stage.is_main for stage in config.stages] == [False, False, True]
    assert (outer.d_mlp, middle.d_mlp, main.d_mlp) == (0, 4096, 5504)
    assert outer.attention is None
    assert main.mamba2 is None
    assert (middle.attention.num_heads, middle.attention.head_dim) == (16, 96)
    assert (middle.attention.rotary_dim, middle.attention.window) == (48, 1023)
    assert main.attention.window == -1
    assert (middle.mamba2.d_inner, middle.mamba2.num_heads, middle.mamba2.conv_channels) == (3072, 48, 3328)
    assert middle.mamba2.in_proj_width == 2 * 3072 + 2 * 128 + 48


def test_an_unknown_published_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"^hnet_3stage: no such official configuration; there are hnet_1stage_L, "):
        ModelConfig.official("hnet_3stage")


# ── flattening ────────────────────────────────────────────────────────────────────────────────


def test_prefixes_follow_the_nesting_of_the_checkpoint(document):
    config = ModelConfig.from_dict(document())
    assert [[stack.prefix for stack in stage.stacks] for stage in config.stages] == [
        ["backbone.encoder", "backbone.decoder"],
        ["backbone.main_network.encoder", "backbone.main_network.decoder"],
        ["backbone.main_network.main_network.main_network"],
    ]


def test_four_routed_stages_flatten_outermost_first(document):
    layout = ["m1", ["t2", ["M1t1", ["T1m2", ["T3"], "m2"], "T1"], "t1M1"], "m3"]
    config = ModelConfig.from_dict(
        document(arch_layout=layout, d_model=[64, 64, 96, 128, 160], d_intermediate=[0, 128, 128, 128, 256])
        | {
            "attn_cfg": {
                "num_heads": [4, 4, 4, 4, 4],
                "rotary_emb_dim": [8, 8, 8, 8, 8],
                "window_size": [1, 2, 3, 4, 5],
            },
        }
    )
    assert config.num_routed_stages == 4
    assert stacks_of(config) == [
        ((MAMBA,), (MAMBA,) * 3),
        ((ATTENTION, ATTENTION), (ATTENTION, MAMBA_MLP)),
        ((MAMBA_MLP, ATTENTION), (ATTENTION_MLP,)),
        ((ATTENTION_MLP, MAMBA, MAMBA), (MAMBA, MAMBA)),
        ((ATTENTION_MLP,) * 3,),
    ]
    assert [stage.attention.window for stage in config.stages[1:]] == [2, 3, 4, 5]
    assert [stage.index for stage in config.stages] == [0, 1, 2, 3, 4]
    assert config.stages[4].stacks[0].prefix == "backbone" + ".main_network" * 5


@pytest.mark.parametrize("letter", "mMtT")
def test_every_letter_may_stand_in_every_stack(document, letter):
    config = ModelConfig.from_dict(
        document(arch_layout=[f"{letter}2", [f"{letter}1"], f"{letter}1"], d_intermediate=[100] * 3)
    )
    assert stacks_of(config) == [((LETTERS[letter],) * 2, (LETTERS[letter],)), ((LETTERS[letter],),)]
    for stage in config.stages:
        assert (stage.attention is None) == (letter in "mM")
        assert (stage.mamba2 is None) == (letter in "tT")
        assert stage.d_mlp == (128 if letter.isupper() else 0)


def test_a_main_network_alone_is_one_stage_without_router(document):
    config = ModelConfig.from_dict(document(arch_layout=["T1m1"], d_model=[64], d_intermediate=[200]))
    (stage,) = config.stages
    assert config.num_routed_stages == 0
    assert stage.is_main
    assert stage.stack("main").prefix == "backbone.main_network"
    assert not any("routing_module" in key or "pad_dimension" in key for key in tensor_shapes(config))


def test_tied_embeddings_have_no_head_of_their_own(document):
    tied = ModelConfig.from_dict(document(tie_embeddings=True))
    untied = ModelConfig.from_dict(document(tie_embeddings=False))
    assert set(tensor_shapes(untied)) - set(tensor_shapes(tied)) == {"lm_head.weight"}
    assert untied.num_parameters - tied.num_parameters == 256 * 64
    assert ModelConfig.from_dict(document(tie_embeddings=None)).tie_embeddings is False


def test_one_value_stands_for_every_stage(document):
    listed = ModelConfig.from_dict(
        document(
            ssm_cfg={"d_state": [16, 16, 16], "d_conv": [3, 3, 3], "expand": [4, 4, 4]},
            attn_cfg={"num_heads": [2, 2, 2], "rotary_emb_dim": [6, 6, 6], "window_size": [7, 7, 7]},
        )
    )
    single = ModelConfig.from_dict(
        document(
            ssm_cfg={"d_state": 16, "d_conv": 3, "expand": 4},
            attn_cfg={"num_heads": 2, "rotary_emb_dim": 6, "window_size": 7},
        )
    )
    assert listed.stages == single.stages


def test_a_list_gives_each_stage_its_own_value(document):
    config = ModelConfig.from_dict(
        document(
            ssm_cfg={"d_state": [16, 48, 1], "d_conv": [3, 4, 2], "expand": [2, 4, 2]},
            attn_cfg={"num_heads": [1, 3, 8], "rotary_emb_dim": [0, 32, 10], "window_size": [-1, 0, 9]},
        )
    )
    outer, middle, main = config.stages
    assert (outer.mamba2.d_state, outer.mamba2.d_conv, outer.mamba2.d_inner) == (16, 3, 128)
    assert (middle.mamba2.d_state, middle.mamba2.d_conv, middle.mamba2.d_inner) == (48, 4, 384)
    assert (middle.attention.num_heads, middle.attention.rotary_dim, middle.attention.window) == (3, 32, 0)
    assert (main.attention.num_heads, main.attention.head_dim, main.attention.rotary_dim) == (8, 16, 10)


def test_settings_that_are_left_out_take_the_released_defaults(document):
    config = ModelConfig.from_dict(document(ssm_cfg={}, attn_cfg={"num_heads": [4, 4, 4]}))
    assert (config.stages[0].mamba2.d_state, config.stages[0].mamba2.d_conv) == (128, 4)
    assert config.stages[0].mamba2.d_inner == 128
    assert (config.stages[1].attention.rotary_dim, config.stages[1].attention.window) == (0, -1)


def test_settings_of_a_mixer_nobody_uses_may_be_missing(document):
    attention_alone = ModelConfig.from_dict(document(arch_layout=["t1", ["T1"], "t1"], ssm_cfg=None))
    mamba_alone = ModelConfig.from_dict(document(arch_layout=["m1", ["m1"], "m1"], attn_cfg=None))
    assert all(stage.mamba2 is None for stage in attention_alone.stages)
    assert all(stage.attention is None for stage in mamba_alone.stages)


@pytest.mark.parametrize(("given_width", "width"), [(1, 128), (128, 128), (129, 256), (300, 384), (None, 384)])
def test_an_mlp_is_as_wide_as_the_next_multiple_of_128(document, given_width, width):
    config = ModelConfig.from_dict(document(d_intermediate=[0, 128, given_width]))
    assert config.stages[2].d_mlp == width  # without a value: 8/3 of 128 is 341


def test_a_configuration_cannot_be_changed(document):
    config = ModelConfig.from_dict(document())
    with pytest.raises(FrozenInstanceError):
        config.stages[0].d_model = 1


def test_the_source_document_can_be_read_again(document):
    config = ModelConfig.from_dict(document())
    assert ModelConfig.from_dict(json.loads(json.dumps(dict(config.source)))) == config


# ── tensors ───────────────────────────────────────────────────────────────────────────────────


def test_tensors_of_every_golden_checkpoint_are_exactly_those_expected(golden):
    held = {key: tuple(tensor.shape) for key, tensor in golden.weights.items()}
    assert tensor_shapes(golden.config) == held
    assert golden.config.num_parameters == sum(tensor.numel() for tensor in golden.weights.values())


def test_parameters_per_stage_and_embeddings_add_up(document):
    config = ModelConfig.from_dict(document())
    sizes = Counter()
    for stage, _, shape in stage_tensor_shapes(config):
        sizes[stage.index] += math.prod(shape)
    assert config.parameters_per_stage == tuple(sizes[s] for s in range(3))
    assert config.num_parameters == sum(config.parameters_per_stage) + 2 * 256 * 64


def test_equal_widths_have_no_pad_dimension(document):
    config = ModelConfig.from_dict(document(d_model=[64, 64, 128]))
    pads = {key: shape for key, shape in tensor_shapes(config).items() if key.endswith("pad_dimension")}
    assert pads == {"backbone.main_network.main_network.pad_dimension": (64,)}


# ── what is refused ───────────────────────────────────────────────────────────────────────────

BROKEN = {
    "layout missing": ({"arch_layout": None}, "arch_layout"),
    "widths missing": ({"d_model": None}, "d_model"),
    "inner widths missing": ({"d_intermediate": None}, "d_intermediate"),
    "unknown key": ({"n_layers": 4}, "n_layers"),
    "vocabulary of tokens": ({"vocab_size": 50257}, "vocab_size"),
    "tie neither true nor false": ({"tie_embeddings": "yes"}, "tie_embeddings"),
    "layout a string": ({"arch_layout": "m2"}, "arch_layout"),
    "layout empty": ({"arch_layout": []}, "arch_layout"),
    "layout of two": ({"arch_layout": ["m2", "m2"]}, "arch_layout"),
    "layout of four": ({"arch_layout": ["m2", ["T2"], "m2", "m2"]}, "arch_layout"),
    "inner layout not a list": ({"arch_layout": ["m2", "T2", "m2"]}, r"arch_layout\[1\]"),
    "inner layout of two": ({"arch_layout": ["m2", ["T2", "T2"], "m2"]}, r"arch_layout\[1\]"),
    "decoder not layers": ({"arch_layout": ["m2", ["T2"], ["m2"]]}, r"arch_layout\[2\]"),
    "encoder not layers": ({"arch_layout": [["T2"], ["T2"], "m2"]}, r"arch_layout\[0\]"),
    "main not layers": ({"arch_layout": ["m2", [7], "m2"]}, r"arch_layout\[1\]\[0\]"),
    "unknown letter": ({"arch_layout": ["m2", ["R2"], "m2"]}, r"arch_layout\[1\]\[0\]"),
    "letter without a count": ({"arch_layout": ["m", ["T2"], "m2"]}, r"arch_layout\[0\]"),
    "count without a letter": ({"arch_layout": ["2", ["T2"], "m2"]}, r"arch_layout\[0\]"),
    "text after the layers": ({"arch_layout": ["m2 ", ["T2"], "m2"]}, r"arch_layout\[0\]"),
    "stack of no layers": ({"arch_layout": ["m0", ["T2"], "m2"]}, "arch_layout"),
    "too few widths": ({"d_model": [64, 96]}, "d_model"),
    "one width for all": ({"d_model": 64}, "d_model"),
    "width a float": ({"d_model": [64, 96.0, 128]}, r"d_model\[1\]"),
    "width a boolean": ({"d_model": [True, 96, 128]}, r"d_model\[0\]"),
    "width zero": ({"d_model": [0, 96, 128]}, r"d_model\[0\]"),
    "narrower inside": ({"d_model": [128, 96, 128]}, r"d_model\[1\]"),
    "too few inner widths": ({"d_intermediate": [0, 128]}, "d_intermediate"),
    "no inner width for an MLP": ({"d_intermediate": [0, 128, 0]}, r"d_intermediate\[2\]"),
    "inner width a string": ({"d_intermediate": [0, "128", 128]}, r"d_intermediate\[1\]"),
    "no SSM settings": ({"ssm_cfg": None}, "ssm_cfg"),
    "SSM settings a list": ({"ssm_cfg": [4]}, "ssm_cfg"),
    "unknown SSM setting": ({"ssm_cfg": {"headdim": 32}}, r"ssm_cfg\.headdim"),
    "state a string": ({"ssm_cfg": {"d_state": "64"}}, r"ssm_cfg\.d_state"),
    "state zero": ({"ssm_cfg": {"d_state": 0}}, r"ssm_cfg\.d_state"),
    "too few states": ({"ssm_cfg": {"d_state": [32, 32]}}, r"ssm_cfg\.d_state"),
    "convolution of one tap": ({"ssm_cfg": {"d_conv": 1}}, r"ssm_cfg\.d_conv"),
    "inner width no multiple of the head": ({"d_model": [80, 96, 128]}, r"d_model\[0\]"),
    "no attention settings": ({"attn_cfg": None}, "attn_cfg"),
    "unknown attention setting": ({"attn_cfg": {"num_heads": 4, "num_kv_heads": 2}}, r"attn_cfg\.num_kv_heads"),
    "no heads": ({"attn_cfg": {}}, r"attn_cfg\.num_heads"),
    "too few heads": ({"attn_cfg": {"num_heads": [4, 4]}}, r"attn_cfg\.num_heads"),
    "heads zero": ({"attn_cfg": {"num_heads": [4, 0, 4]}}, r"attn_cfg\.num_heads\[1\]"),
    "heads do not divide the width": ({"attn_cfg": {"num_heads": [4, 4, 5]}}, r"attn_cfg\.num_heads\[2\]"),
    "rotary odd": ({"attn_cfg": {"num_heads": 4, "rotary_emb_dim": 7}}, r"attn_cfg\.rotary_emb_dim"),
    "rotary above the head": ({"attn_cfg": {"num_heads": 4, "rotary_emb_dim": 26}}, r"attn_cfg\.rotary_emb_dim\[1\]"),
    "rotary negative": ({"attn_cfg": {"num_heads": 4, "rotary_emb_dim": -2}}, r"attn_cfg\.rotary_emb_dim"),
    "window below minus one": ({"attn_cfg": {"num_heads": 4, "window_size": -2}}, r"attn_cfg\.window_size"),
    "window a float": ({"attn_cfg": {"num_heads": 4, "window_size": 15.5}}, r"attn_cfg\.window_size"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_configuration_is_one_line_naming_file_and_key(document, tmp_path, what):
    changes, key = BROKEN[what]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ConfigError, match=key) as caught:
        ModelConfig.from_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not valid JSON"),
        (b'{"arch_layout": ["m2"', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, complaint):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        ModelConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "absent.json"
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        ModelConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")


# ── any layout ────────────────────────────────────────────────────────────────────────────────

stack_layers = st.lists(st.tuples(st.sampled_from("mMtT"), st.integers(1, 3)), min_size=1, max_size=3)


@st.composite
def layouts(draw):
    """(nested arch_layout, widths, the flat list of stacks it must become)."""
    depth = draw(st.integers(1, 5))
    flat = [(draw(stack_layers), draw(stack_layers)) for _ in range(depth - 1)] + [(draw(stack_layers),)]
    widths = sorted(draw(st.lists(st.sampled_from([64, 96, 128, 192]), min_size=depth, max_size=depth)))

    def text(layers):
        return "".join(f"{letter}{count}" for letter, count in layers)

    nested = [text(flat[-1][0])]
    for encoder, decoder in reversed(flat[:-1]):
        nested = [text(encoder), nested, text(decoder)]
    expected = [
        tuple(tuple(LETTERS[letter] for letter, count in stack for _ in range(count)) for stack in stage)
        for stage in flat
    ]
    return nested, widths, expected


@given(layouts(), st.booleans())
def test_any_nested_layout_flattens_to_unique_tensors_under_its_own_prefixes(drawn, tied):
    nested, widths, expected = drawn
    config = ModelConfig.from_dict(
        {
            "arch_layout": nested,
            "d_model": widths,
            "d_intermediate": [100] * len(widths),
            "ssm_cfg": {"d_state": 8},
            "attn_cfg": {"num_heads": 4},
            "tie_embeddings": tied,
        }
    )
    assert stacks_of(config) == expected
    assert [stage.d_model for stage in config.stages] == widths
    assert [stage.pad_width for stage in config.stages] == [0] + [b - a for a, b in pairwise(widths)]

    keys = [key for _, key, _ in stage_tensor_shapes(config)]
    assert len(keys) == len(set(keys))
    depth = len(widths)
    for stage, key, shape in stage_tensor_shapes(config):
        assert key.startswith("backbone" + ".main_network" * stage.index + ".")
        rest = key.removeprefix(stage.prefix + ".").split(".")
        networks = {"main_network"} if stage.index == depth - 1 else {"encoder", "decoder"}
        assert rest[0] in networks | {"pad_dimension", "routing_module", "residual_proj"}
        assert all(extent > 0 for extent in shape)

    shapes = tensor_shapes(config)
    assert len(shapes) == len(keys) + (1 if tied else 2)
    assert config.num_parameters == sum(map(math.prod, shapes.values()))
    mixers = sum(len(stack) for stage in expected for stack in stage)
    assert sum(key.endswith(".norm1.weight") for key in shapes) == mixers
    with_mlp = sum(layer.has_mlp for stage in expected for stack in stage for layer in stack)
    assert sum(key.endswith(".mlp.fc1.weight") for key in shapes) == with_mlp
    assert sum(key.endswith("routing_module.q_proj_layer.weight") for key in shapes) == depth - 1
    assert sum(key.endswith("pad_dimension") for key in shapes) == sum(a < b for a, b in pairwise(widths))
