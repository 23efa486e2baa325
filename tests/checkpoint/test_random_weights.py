"""Random models: the same in every dtype and every time, and alive enough to be benchmarked."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.checkpoint.random_weights import random_tensor
from hnet_runtime.config import tensor_shapes
from hnet_runtime.model.reference import Reference

TEXT = (
    "Once upon a time there was a little girl who lived in a village near the forest. Whenever she went "
    "out, she wore a red cloak. Der Fuchs springt über den faulen Hund; 日本語。 def f(x): return x * 2"
).encode()


@pytest.fixture
def source(golden):
    return locate(f"random:{golden.path}")


def test_random_model_has_every_tensor_of_its_config(source):
    weights = load_weights(source, dtype=torch.float32)
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == tensor_shapes(source.config)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_seed_fixes_the_weights(source):
    first, again = (load_weights(source, dtype=torch.float32) for _ in range(2))
    other = load_weights(dataclasses.replace(source, seed=1), dtype=torch.float32)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_a_tensor_depends_on_its_key_alone(source):
    weights = load_weights(source, dtype=torch.float32)
    for key in reversed(list(weights)):
        assert torch.equal(weights[key], random_tensor(source.config, key)), key


def test_other_dtypes_are_the_same_model_rounded(source):
    exact = load_weights(source, dtype=torch.float32)
    rounded = load_weights(source, dtype=torch.bfloat16)
    for key, tensor in rounded.items():
        assert torch.equal(tensor, exact[key].to(tensor.dtype)), key


@pytest.mark.parametrize("name", ["a_1stage", "b_2stage"])
def test_routers_open_chunks_now_and_then(golden_case, name):
    source = locate(f"random:{golden_case(name).path}")
    output = Reference(source.config, load_weights(source, dtype=torch.float32)).forward(torch.tensor([254, *TEXT]))
    assert bool(output.logits.isfinite().all())
    for boundaries in output.boundaries:
        assert 1.3 < len(boundaries) / int(boundaries.sum()) < 12


def test_unknown_key_has_no_tensor(source):
    with pytest.raises(KeyError):
        random_tensor(source.config, "backbone.bonus")
