"""A model of nothing but full attention, which keeps no state of fixed size: what is cached of it is pages alone."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import SamplingParams


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_prompt_read_again_comes_from_the_cache_and_goes_on_alike(make_case, tmp_path, kernels):
    config, weights = make_case(3, ["T2"], [64], window_size=[-1])
    save_file(dict(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(config.source)), encoding="utf-8")
    engine = Engine.from_pretrained(tmp_path, engine_config=EngineConfig(kernels=kernels, max_num_seqs=2))
    prompt = b"\xfe" + b"What is read twice is computed once. " * 3
    params = SamplingParams(max_tokens=24, temperature=0.0)
    (first,) = engine.generate([prompt], params)
    (again,) = engine.generate([prompt], params)
    assert again.usage.cached_bytes > 0
    assert again.data == first.data
