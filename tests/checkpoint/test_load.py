"""Weights come out as they went in, in the dtype asked for; anything amiss is named, key and file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hnet_runtime.checkpoint import CheckpointError, load_weights, locate, parameter_dtype
from hnet_runtime.config import tensor_shapes

BF16, FP32 = torch.bfloat16, torch.float32


def _load(path, **options):
    return load_weights(locate(path), **{"dtype": FP32, **options})


def _refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        _load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_golden_model_loads_exactly(golden):
    weights = load_weights(locate(golden.path), dtype=FP32)
    assert list(weights) == list(tensor_shapes(golden.config))
    for key, tensor in weights.items():
        assert torch.equal(tensor, golden.weights[key].float()), key


def test_demo_model_loads_exactly():
    source = locate(None)
    weights = load_weights(source, dtype=FP32)
    assert sum(tensor.numel() for tensor in weights.values()) == source.config.num_parameters
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors", "write_shards"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_every_form_gives_the_same_tensors(small, tmp_path, write, dtype):
    getattr(small, write)(tmp_path)
    weights = _load(tmp_path, dtype=dtype)
    assert set(weights) == set(small.weights)
    for key, tensor in weights.items():
        assert tensor.dtype is parameter_dtype(key, dtype), key
        assert tensor.is_contiguous(), key
        assert torch.equal(tensor, small.weights[key].to(tensor.dtype)), key


def test_what_decides_boundaries_stays_in_float32(small):
    kept = {key for key in small.weights if parameter_dtype(key, BF16) is FP32}
    named = (".residual_proj.weight", ".residual_proj.bias", ".mixer.D", ".mixer.A_log", ".mixer.dt_bias")
    assert kept == {key for key in small.weights if key.endswith(named)}
    assert len(kept) == 2 * 2 + 6 * 3  # two routed stages; six Mamba-2 layers


def test_loaded_tensors_do_not_depend_on_the_file_afterwards(small, tmp_path):
    path = small.write_pickle(tmp_path)
    weights = _load(tmp_path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(weights["embeddings.weight"], small.weights["embeddings.weight"])


def test_tensors_that_are_views_of_others_come_out_right(small, tmp_path):
    key = "backbone.residual_proj.weight"
    small.weights[key] = small.weights[key].T.contiguous().T  # same values, other strides
    small.write_pickle(tmp_path)
    assert torch.equal(_load(tmp_path)[key], small.weights[key])


def test_progress_reaches_the_size_of_the_model(small, tmp_path):
    small.write_pickle(tmp_path)
    seen: list[tuple[int, int]] = []
    weights = _load(tmp_path, dtype=BF16, progress=lambda done, total: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in weights.values())
    assert len(seen) == len(weights)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (size, size)
    assert {total for _, total in seen} == {size}


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_state_dict_inside_a_usual_wrapper_is_found(small, tmp_path, wrapper):
    small.write_config(tmp_path)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({wrapper: small.weights, "optimizer": optimizer, "step": 7}, tmp_path / "model.pt")
    assert torch.equal(_load(tmp_path)["lm_head.weight"], small.weights["lm_head.weight"])


def test_two_state_dicts_are_not_guessed_between(small, tmp_path):
    small.write_config(tmp_path)
    torch.save({"ema": small.weights, "live": small.weights}, tmp_path / "model.pt")
    message = _refusal(tmp_path)
    assert "'ema', 'live'" in message
    assert "model.pt" in message


def test_entries_that_are_no_tensors_are_left_aside(small, tmp_path):
    small.write_pickle(tmp_path, step=1000, note="trained for a while", nothing=None)
    assert set(_load(tmp_path)) == set(small.weights)


# ── tied embeddings ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors"])
def test_tied_head_may_be_absent_or_equal(small, tmp_path, write):
    small.document["tie_embeddings"] = True
    small.weights["lm_head.weight"] = small.weights["embeddings.weight"].clone()
    getattr(small, write)(tmp_path / "with")
    del small.weights["lm_head.weight"]
    getattr(small, write)(tmp_path / "without")
    with_head, without = _load(tmp_path / "with"), _load(tmp_path / "without")
    assert set(with_head) == set(without) == set(small.weights)


def test_tied_head_that_differs_is_refused(small, tmp_path):
    small.document["tie_embeddings"] = True
    path = small.write_pickle(tmp_path)
    message = _refusal(tmp_path)
    assert str(path) in message
    assert "'lm_head.weight' differs" in message


def test_untied_head_must_be_there(small, tmp_path):
    del small.weights["lm_head.weight"]
    small.write_pickle(tmp_path)
    assert "missing key 'lm_head.weight'" in _refusal(tmp_path)


# ── what is amiss is named ────────────────────────────────────────────────────────────────────

KEY = "backbone.main_network.encoder.layers.0.mixer.Wqkv.weight"


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors"])
def test_missing_key_is_named(small, tmp_path, write):
    del small.weights[KEY]
    path = getattr(small, write)(tmp_path)
    assert _refusal(tmp_path) == f"{path}: missing key '{KEY}'"


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors"])
def test_unexpected_key_is_named(small, tmp_path, write):
    small.weights["backbone.bonus"] = torch.ones(2)
    path = getattr(small, write)(tmp_path)
    assert _refusal(tmp_path) == f"{path}: unexpected key 'backbone.bonus'"


def test_renamed_key_shows_both_names(small, tmp_path):
    small.weights["renamed"] = small.weights.pop(KEY)
    small.write_pickle(tmp_path)
    message = _refusal(tmp_path)
    assert f"missing key '{KEY}'" in message
    assert "unexpected key 'renamed'" in message


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors"])
def test_mis_shaped_key_is_named_with_both_shapes(small, tmp_path, write):
    small.weights[KEY] = torch.zeros(288, 95)
    path = getattr(small, write)(tmp_path)
    message = _refusal(tmp_path)
    assert str(path) in message
    assert KEY in message
    assert "[288, 95]" in message
    assert "[288, 96]" in message


def test_config_of_another_model_is_refused_by_key(small, tmp_path):
    path = small.write_pickle(tmp_path)
    message = _refusal_with_config(path, "hnet_1stage_L")
    assert str(path) in message
    assert "missing key 'backbone.encoder.layers.2." in message
    assert "more)" in message


def _refusal_with_config(path, config) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(locate(path, config=config), dtype=FP32)
    return str(caught.value)


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors"])
def test_tensor_that_is_not_floating_point_is_named(small, tmp_path, write):
    small.weights[KEY] = torch.zeros(288, 96, dtype=torch.int8)
    path = getattr(small, write)(tmp_path)
    message = _refusal(tmp_path)
    assert str(path) in message
    assert KEY in message


def test_key_in_two_shards_is_refused(small, tmp_path):
    small.write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({key: small.weights[key] for key in sorted(small.weights)[1:]}, shard)
    assert "is also in" in _refusal(tmp_path)


@pytest.mark.parametrize("write", ["write_pickle", "write_safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.9, 0.9999])
def test_truncated_file_is_refused_by_name(small, tmp_path, write, share):
    path = getattr(small, write)(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = _refusal(tmp_path)
    assert str(path) in message
    assert "truncated" in message


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, this is not a checkpoint at all", b"\x00" * 500])
def test_file_that_is_no_checkpoint_is_refused_by_name(small, tmp_path, name, content):
    small.write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in _refusal(tmp_path)


def test_large_file_pointer_is_recognised(small, tmp_path):
    small.write_config(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "Git LFS pointer" in _refusal(tmp_path)


@pytest.mark.parametrize("content", [[1, 2, 3], torch.ones(3), "text", {"epoch": 3}, {}])
def test_pickle_without_tensors_is_refused(small, tmp_path, content):
    small.write_config(tmp_path)
    torch.save(content, tmp_path / "model.pt")
    message = _refusal(tmp_path)
    assert "model.pt" in message
    assert "tensors" in message


def test_sparse_tensor_is_refused(small, tmp_path):
    small.weights[KEY] = small.weights[KEY].to_sparse()
    small.write_pickle(tmp_path)
    assert KEY in _refusal(tmp_path)
