"""A step made of Triton kernels can be captured: on fake CUDA tensors it calls these ops and what is on the list."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hnet_runtime.config import ModelConfig, official_names
from hnet_runtime.model.captured import step_kinds
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.triton.launching import OPERATIONS
from tests.gpu import allow_list
from tests.gpu.fake_cuda import fake_cuda
from tests.gpu.proofs import prove_capturable
from tests.gpu.steps import StepSubject, fake_model, shortened


@pytest.fixture(scope="module")
def mode(tmp_path_factory):
    return fake_cuda(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", official_names())
def test_every_step_of_the_official_models_in_triton_can_be_captured(monkeypatch, mode, name, dtype):
    ops = StepOps.triton()
    monkeypatch.setattr(allow_list, "ALLOWED", allow_list.ALLOWED | OPERATIONS.keys())
    config = shortened(ModelConfig.official(name))
    with mode:
        model = fake_model(config, dtype, ops)
        for stage, parks in step_kinds(len(config.stages)):
            prove_capturable(lambda _, at=(stage, parks): StepSubject(model, *at), mode, 4)
