"""The MODEL argument: what each form finds, and what is said where it finds nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hnet_runtime.checkpoint import CheckpointError, locate
from hnet_runtime.checkpoint.locate import is_hub_id
from hnet_runtime.config import ConfigError, ModelConfig


def test_no_name_is_the_bundled_demo_model():
    source = locate(None)
    assert source.name == "demo"
    assert [path.name for path in source.weights] == ["model.safetensors"]
    assert source.config.num_routed_stages == 1


def test_demo_is_the_bundled_model_unless_a_path_is_called_so(small, tmp_path, monkeypatch):
    assert locate("demo") == locate(None)
    small.write_pickle(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert locate("demo").config == small.config
    assert locate(None).config != small.config


def test_directory_gives_its_config_and_weights(small, tmp_path):
    path = small.write_pickle(tmp_path / "fable", name="anything.pt")
    source = locate(tmp_path / "fable")
    assert source.name == "fable"
    assert source.weights == (path,)
    assert source.config == small.config


def test_safetensors_win_over_a_pickle_in_the_same_directory(small, tmp_path):
    small.write_pickle(tmp_path)
    assert locate(tmp_path).weights[0].suffix == ".pt"
    path = small.write_safetensors(tmp_path)
    assert locate(tmp_path).weights == (path,)


def test_index_gives_every_shard_once(small, tmp_path):
    small.write_shards(tmp_path)
    assert [path.name for path in locate(tmp_path).weights] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_file_finds_the_config_beside_it(small, tmp_path):
    path = small.write_safetensors(tmp_path, name="fable.safetensors")
    source = locate(path)
    assert (source.name, source.weights, source.config) == ("fable", (path,), small.config)


def test_file_called_model_is_named_after_its_directory(small, tmp_path):
    assert locate(small.write_pickle(tmp_path / "fable")).name == "fable"


@pytest.mark.parametrize("form", ["file", "directory"])
def test_config_may_lie_elsewhere(small, tmp_path, form):
    path = small.write_pickle(tmp_path / "weights")
    elsewhere = small.write_config(tmp_path / "elsewhere")
    (tmp_path / "weights" / "config.json").unlink()
    given = elsewhere if form == "file" else elsewhere.parent
    assert locate(path, config=given).config == small.config


def test_official_file_without_config_is_known_by_its_name(tmp_path):
    path = tmp_path / "hnet_1stage_L.pt"
    path.write_bytes(b"unread")
    assert locate(path).config == ModelConfig.official("hnet_1stage_L")
    assert locate(tmp_path).config == ModelConfig.official("hnet_1stage_L")


def test_config_may_be_an_official_name(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"unread")
    assert locate(path, config="hnet_2stage_L").config == ModelConfig.official("hnet_2stage_L")


@pytest.mark.parametrize("name", ["hnet_1stage_L", "hnet_2stage_XL"])
def test_random_takes_an_official_shape(name):
    source = locate(f"random:{name}")
    assert source.is_random
    assert (source.name, source.config) == (f"random:{name}", ModelConfig.official(name))


def test_random_takes_a_given_shape(small, tmp_path):
    config = small.write_config(tmp_path)
    assert locate(f"random:{config}").config == small.config
    assert locate(f"random:{tmp_path}").config == small.config


def test_existing_path_wins_over_a_hub_id(small, tmp_path, monkeypatch):
    small.write_safetensors(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name").weights == (Path("owner/name/model.safetensors"),)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("cartesia-ai/hnet_2stage_XL", True),
        ("owner/name.v2", True),
        ("hnet_2stage_XL", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("../name", False),
        ("weights/model.pt", False),
        ("weights/model.safetensors", False),
        ("shapes/config.json", False),
        ("Once upon/a time", False),
    ],
)
def test_hub_ids_are_told_from_paths(text, is_one):
    assert is_hub_id(text) is is_one


def _refusal(model, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["nowhere", "no/such/model", "./nowhere/model", "weights/model.pt", "a b", "x" * 5000, "a\0b", "~nobody/x"]
)
def test_name_that_is_neither_path_nor_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = _refusal(name)
    assert repr(name) in message
    assert "no such file or directory" in message


def test_empty_name_is_refused():
    assert "empty" in _refusal("")


def test_bare_official_name_is_answered_with_what_to_type():
    message = _refusal("hnet_1stage_L")
    assert "cartesia-ai/hnet_1stage_L" in message
    assert "random:hnet_1stage_L" in message


def test_random_without_a_known_shape_is_refused():
    assert "hnet_9stage_Q" in _refusal("random:hnet_9stage_Q")
    assert "hnet_1stage_L" in _refusal("random:")


def test_random_refuses_a_second_config(small, tmp_path):
    assert "--config" in _refusal("random:hnet_1stage_L", config=small.write_config(tmp_path))


def test_directory_without_weights_is_refused(small, tmp_path):
    small.write_config(tmp_path)
    message = _refusal(tmp_path)
    assert str(tmp_path) in message
    assert "no weights" in message


def test_directory_without_config_is_refused(small, tmp_path):
    small.write_pickle(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "no config.json" in _refusal(tmp_path)


def test_several_weight_files_without_an_index_are_refused(small, tmp_path):
    first = small.write_pickle(tmp_path, name="first.pt")
    shutil.copy(first, tmp_path / "second.pt")
    message = _refusal(tmp_path)
    assert "first.pt" in message
    assert "name one file" in message


def test_missing_config_file_is_refused(small, tmp_path):
    path = small.write_pickle(tmp_path)
    assert "nowhere.json" in _refusal(path, config=tmp_path / "nowhere.json")


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert "model.gguf" in _refusal(path)


def test_index_that_lists_a_missing_shard_is_refused(small, tmp_path):
    small.write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lists model-00002-of-00002.safetensors, which is not there" in _refusal(tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        "not json",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../outside.safetensors"}}',
        '{"weight_map": {"a": "model.pt"}}',
    ],
)
def test_index_that_is_none_is_refused(small, tmp_path, document):
    small.write_shards(tmp_path).write_text(document)
    assert "model.safetensors.index.json" in _refusal(tmp_path)


def test_revision_is_refused_where_there_is_none_to_choose(small, tmp_path):
    small.write_pickle(tmp_path)
    for model in (None, tmp_path, tmp_path / "model.pt", "random:hnet_1stage_L"):
        assert "--revision" in _refusal(model, revision="main")


def test_config_that_does_not_nest_says_so(small, tmp_path):
    small.document["arch_layout"] = ["m2", ["T1m1", "T2", "m1T1"], "m2"]
    small.write_pickle(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: arch_layout"):
        locate(tmp_path)


def test_config_that_is_not_json_says_so(small, tmp_path):
    small.write_pickle(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small.document)[:-5])
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        locate(tmp_path)
