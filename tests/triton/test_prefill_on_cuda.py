"""A prompt through a whole model on a GPU that is not here: what it is read with, and on which tensors.

Kernels are listed instead of launched; torch's own operations run on fake CUDA tensors, which refuse to meet others.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hnet_runtime.config import ModelConfig, official_names
from hnet_runtime.engine.building import build_model, choose_library, gpu_ops
from hnet_runtime.engine.config import EngineConfig, EngineError
from hnet_runtime.model import hierarchy
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.prefill import PrefillOps
from hnet_runtime.ops.triton import prefill_attention, scan
from hnet_runtime.ops.triton.launching import recording
from tests.gpu.fake_cuda import fake_cuda
from tests.gpu.steps import fake_weights, new_rows, shortened
from tests.triton import library_stand_ins

CUDA = torch.device("cuda")
KERNELS = {
    "mamba2": {"convolve_spans", "carry_spans", "tile_products", "tile_states", "pass_states", "tile_output"},
    "attention": {"rotate_spans", "attend_spans", "keep_spans"},
}


@pytest.fixture(scope="module")
def mode(tmp_path_factory):
    return fake_cuda(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def host(monkeypatch):
    """What the host tells is fake as well; what it hears is that every third position opens a chunk."""
    from_numpy = torch.from_numpy

    def shape_of(array):
        return torch.empty(array.shape, dtype=from_numpy(array[:0].copy()).dtype)

    monkeypatch.setattr(torch, "from_numpy", shape_of)
    monkeypatch.setattr(hierarchy, "_on_host", lambda p: (np.arange(p.shape[0]) % 3 == 0).astype(np.float32))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", official_names())
def test_prompts_of_the_official_models_are_read_by_kernels_alone(mode, name, dtype):
    config = shortened(ModelConfig.official(name))
    with mode:
        model = build_model(config, fake_weights(config, dtype), EngineConfig(), None)
        state = new_rows(model)
        with recording() as launches:
            result = model.run(state, [1, 2, 3], [b"a" * 70, b"b" * 9, b"c"], [1, 9, 1])
            model.run(state, [2, 1], [b"d", b"e" * 5], [0, 1])
    assert (result.logits.shape, result.logits.dtype, result.logits.device.type) == ((11, 256), torch.float32, "cuda")
    mixers = {layer.mixer for stage in config.stages for stack in stage.stacks for layer in stack.layers}
    expected = {"smooth_spans"}.union(*(KERNELS[mixer] for mixer in mixers))
    assert {launch.name for launch in launches} == expected
    for launch in launches:
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}, launch.name


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", ["hnet_1stage_L", "hnet_2stage_XL"])
def test_what_one_prompt_has_compiled_serves_all(mode, name):
    """Sizes that Triton would look at: 1, multiples of 16 and others; of positions, spans and tiles."""
    config = shortened(ModelConfig.official(name))
    with mode:
        model = build_model(config, fake_weights(config, torch.bfloat16), EngineConfig(), None)
        state = new_rows(model)
        with recording() as launches:
            model.run(state, [0], [bytes(64)], [1])
        compiled = {launch.key for launch in launches}
        for pieces in ([b"a"], [b"a" * 16], [b"a" * 17], [b"a" * 100, b"b"], [b"a", b"b", b"c"]):
            with recording() as launches:
                model.run(state, range(1, 1 + len(pieces)), pieces, [1] * len(pieces))
            others = {launch.name for launch in launches if launch.key not in compiled}
            assert launches
            assert not others, pieces


@pytest.fixture
def installed(monkeypatch):
    for module in ("causal_conv1d", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, library_stand_ins)


@pytest.mark.usefixtures("installed")
def test_libraries_run_prompts_only_where_they_are_asked_for():
    steps, prefill = gpu_ops(EngineConfig(), CUDA)
    assert (steps, prefill.attend) == (StepOps.triton(), prefill_attention.attend)
    assert set(prefill.forms.values()) == {"triton"}
    steps, prefill = gpu_ops(EngineConfig(kernels="libraries"), CUDA)
    assert prefill.attend is not prefill_attention.attend
    assert prefill.selective_scan is scan.selective_scan
    assert steps.name == "triton, convolution of prompts causal-conv1d, attention of prompts flash-attn"


def test_torch_runs_prompts_where_it_is_asked_for_or_there_is_no_triton(monkeypatch):
    torch_alone = (StepOps.torch(), PrefillOps.torch())
    assert gpu_ops(EngineConfig(kernels="torch"), CUDA) == torch_alone
    monkeypatch.setattr(StepOps, "triton", classmethod(_no_triton))
    assert gpu_ops(EngineConfig(), CUDA) == torch_alone
    for kernels in ("triton", "libraries"):
        with pytest.raises(EngineError, match=f"kernels {kernels}: Triton cannot be imported: no triton"):
            gpu_ops(EngineConfig(kernels=kernels), CUDA)


def _no_triton(cls):
    raise ImportError("no triton")


@pytest.mark.parametrize("kernels", ["triton", "libraries"])
def test_kernels_of_gpus_are_refused_on_a_cpu(kernels):
    with pytest.raises(EngineError, match=f"kernels {kernels}: they need a GPU"):
        choose_library(EngineConfig(kernels=kernels), torch.device("cpu"))
