"""Conversion: the same tensors under the same keys, whole files or none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from hnet_runtime.checkpoint import CheckpointError, conversion, convert, load_weights, locate, parameter_dtype
from hnet_runtime.config import ModelConfig, tensor_shapes

BF16, FP32 = torch.bfloat16, torch.float32


def _stored(path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the handle is no mapping


def test_conversion_keeps_every_bit_and_dtype(golden, tmp_path):
    directory = convert(locate(golden.path), tmp_path / "out")
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    stored = _stored(directory / "model.safetensors")
    assert set(stored) == set(golden.weights)
    for key, tensor in stored.items():
        assert tensor.dtype is golden.weights[key].dtype, key
        assert torch.equal(tensor, golden.weights[key]), key
    assert ModelConfig.from_file(directory / "config.json") == golden.config


def test_converted_model_loads_the_same(golden, tmp_path):
    source = locate(golden.path)
    before = load_weights(source, dtype=FP32)
    after = load_weights(locate(convert(source, tmp_path / "out")), dtype=FP32)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_dtype_can_be_chosen(small, tmp_path):
    small.write_pickle(tmp_path / "in")
    stored = _stored(convert(locate(tmp_path / "in"), tmp_path / "out", BF16) / "model.safetensors")
    for key, tensor in stored.items():
        assert tensor.dtype is parameter_dtype(key, BF16), key
        assert torch.equal(tensor, small.weights[key].to(tensor.dtype)), key


def test_shards_become_one_file(small, tmp_path):
    small.write_shards(tmp_path / "in")
    stored = _stored(convert(locate(tmp_path / "in"), tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(stored[key], small.weights[key]) for key in small.weights)


def test_tied_head_is_written_once(small, tmp_path):
    small.document["tie_embeddings"] = True
    small.weights["lm_head.weight"] = small.weights["embeddings.weight"].clone()
    small.write_pickle(tmp_path / "in")
    stored = _stored(convert(locate(tmp_path / "in"), tmp_path / "out") / "model.safetensors")
    assert set(stored) == set(small.weights) - {"lm_head.weight"}


def test_random_model_can_be_written(golden, tmp_path):
    source = locate(f"random:{golden.path}")
    written = load_weights(locate(convert(source, tmp_path / "out", BF16)), dtype=BF16)
    drawn = load_weights(source, dtype=BF16)
    assert all(torch.equal(written[key], drawn[key]) for key in drawn)


def test_progress_reaches_the_size_of_the_file(small, tmp_path):
    small.write_pickle(tmp_path / "in")
    seen: list[tuple[int, int]] = []
    convert(locate(tmp_path / "in"), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in small.weights.values())
    assert len(seen) == len(tensor_shapes(small.config))
    assert seen[-1] == (size, size)


def test_tensors_start_at_multiples_of_their_item_size(bf16_golden, tmp_path):
    path = convert(locate(bf16_golden.path), tmp_path / "out") / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    widths = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for entry in header.values()} == set(widths)
    for key, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0, key


def test_directory_that_holds_something_is_not_written_to(small, tmp_path):
    small.write_pickle(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"out: is not empty"):
        convert(locate(tmp_path / "in"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_force_replaces_the_two_files_and_nothing_else(small, tmp_path):
    source = locate(small.write_pickle(tmp_path))  # converted where it lies
    convert(source, tmp_path, force=True)
    convert(source, tmp_path, BF16, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.pt", "model.safetensors"]
    assert _stored(tmp_path / "model.safetensors")["lm_head.weight"].dtype is BF16


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_destination_that_looks_like_a_file_is_refused(small, tmp_path, name):
    small.write_pickle(tmp_path / "in")
    with pytest.raises(CheckpointError, match="directory"):
        convert(locate(tmp_path / "in"), tmp_path / name)


def test_destination_that_is_a_file_is_refused(small, tmp_path):
    small.write_pickle(tmp_path / "in")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(locate(tmp_path / "in"), tmp_path / "out")


def test_bad_source_leaves_no_trace(small, tmp_path):
    del small.weights["lm_head.weight"]
    small.write_pickle(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"missing key 'lm_head\.weight'"):
        convert(locate(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_conversion_leaves_no_trace(small, tmp_path):
    small.write_pickle(tmp_path / "in")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(locate(tmp_path / "in"), tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_interrupted_conversion_leaves_the_old_files(small, tmp_path, monkeypatch):
    source = locate(small.write_pickle(tmp_path / "in"))
    out = convert(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(source, out, BF16, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
