"""`hnet convert`: from any form of a model to safetensors, from the command line."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from hnet_runtime.checkpoint import parameter_dtype


def test_official_pickle_becomes_safetensors(hnet, golden, tmp_path):
    result = hnet("convert", golden.path / "model.pt", tmp_path / "out", "--config", golden.path / "config.json")
    assert (result.code, result.errors) == (0, "")
    assert str(tmp_path / "out") in result.text
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(golden.weights)
    assert all(torch.equal(stored[key], golden.weights[key]) for key in stored)
    assert (tmp_path / "out" / "config.json").is_file()


def test_dtype_can_be_chosen(hnet, golden, tmp_path):
    assert hnet("convert", golden.path, tmp_path / "out", "--dtype", "bfloat16").code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.dtype is parameter_dtype(key, torch.bfloat16) for key, tensor in stored.items())


def test_converted_model_writes_the_same_text(hnet, golden_case, tmp_path):
    path = golden_case("b_2stage").path
    assert hnet("convert", path, tmp_path / "out").code == 0
    options = ("Once upon a time", "--max-tokens", "30", "--seed", "1")
    assert hnet("generate", tmp_path / "out", *options).raw == hnet("generate", path, *options).raw


def test_what_lies_there_is_kept_unless_forced(hnet, golden_case, tmp_path):
    path = golden_case("e_iso_T2").path
    (tmp_path / "note.txt").write_text("mine")
    refused = hnet("convert", path, tmp_path)
    assert refused.code == 1
    assert "is not empty" in refused.errors
    assert hnet("convert", path, tmp_path, "--force").code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "note.txt"]
