"""Packed weights in a cache: the same model, mapped; and never a reason not to serve."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from hnet_runtime.checkpoint import locate
from hnet_runtime.engine import building
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.ops.native import cache
from hnet_runtime.ops.native.library import open_library

pytestmark = pytest.mark.skipif(open_library() is None, reason="no native library is built here")
CPU = torch.device("cpu")


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 2, 16, 2).to(torch.bfloat16),
        "c:sums": torch.arange(9, dtype=torch.int32),
        "d": torch.randint(-128, 128, (4, 33), dtype=torch.int8),
        "empty": torch.zeros(0),
    }


@pytest.fixture
def key(tmp_path) -> cache.CacheKey:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    return cache.CacheKey.of([source], "float32", "amx")


def test_what_is_stored_is_found_again_aligned(tmp_path, key):
    stored = tensors()
    assert cache.store(tmp_path / "cache", key, stored)
    found = cache.load(tmp_path / "cache", key)
    assert found is not None
    assert list(found) == list(stored)
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() % cache.ALIGNMENT == 0 or not tensor.numel()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".hnetpacked"]


def test_many_tensors_need_a_longer_index(tmp_path, key):
    stored = {f"backbone.layers.{index}.weight": torch.full((5,), float(index)) for index in range(500)}
    cache.store(tmp_path, key, stored)
    found = cache.load(tmp_path, key)
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_another_packing_or_a_changed_source_is_another_entry(tmp_path, key):
    cache.store(tmp_path / "cache", key, tensors())
    source = Path(key.sources[0][0])
    assert cache.load(tmp_path / "cache", cache.CacheKey.of([source], "float32", "avx2")) is None
    source.write_bytes(b"other weights")
    changed = cache.CacheKey.of([source], "float32", "amx")
    assert cache.load(tmp_path / "cache", changed) is None
    assert cache.store(tmp_path / "cache", changed, tensors())
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what its source has left behind is removed


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"x" + data[1:], lambda data: b""])
def test_a_damaged_entry_is_no_entry(tmp_path, key, damage):
    cache.store(tmp_path, key, tensors())
    path = tmp_path / key.file_name
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load(tmp_path, key) is None


def test_an_entry_that_cannot_be_written_is_said_and_no_error(tmp_path, key, caplog):
    (tmp_path / "file").write_text("in the way")
    assert not cache.store(tmp_path / "file", key, tensors())
    assert "not cached" in caplog.text


def test_where_entries_live(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    assert cache.cache_directory(None) == tmp_path / "hnet-serve" / "packed"
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert cache.cache_directory(None) is None
    assert cache.cache_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
def test_a_model_from_the_cache_is_the_same_bit_for_bit(tmp_path, monkeypatch, golden_case, dtype, quantization):
    monkeypatch.setattr(building, "_CACHED_FROM", 0)
    source = locate(golden_case("b_2stage").path)
    config = EngineConfig(quantization=quantization, weight_cache=str(tmp_path))
    ids = bytes(golden_case("b_2stage").prompt(1).ids.tolist())
    results = []
    for attempt in range(2):
        if attempt:  # the second time the checkpoint is not read

            def refuse(*_args, **_keywords):
                raise AssertionError("the checkpoint was read")

            monkeypatch.setattr(building, "load_weights", refuse)
        model = building.load_model(source, getattr(torch, dtype), CPU, config)
        assert isinstance(model, NativeHNet)
        assert str(model.dtype) == f"torch.{dtype}"
        state = model.new_state(num_rows=1, kv_positions=128, max_positions=128)
        for pool in state.page_pools:
            pool.reserve(1, 128)
        results.append(model.run(state, [1], [ids], [len(ids)]).logits)
    assert torch.equal(*results)
    index = next(tmp_path.iterdir()).read_bytes().split(b"\n", 2)[1]
    assert json.loads(index)["packing"][1] == f"torch.{dtype}"
    assert os.listdir(tmp_path)  # and it stays
