"""Fixtures of the proofs that need no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hnet_runtime.model.captured import CapturedHNet
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.fake_cuda import fake_cuda
from tests.gpu.steps import captured


@pytest.fixture(scope="session")
def fake_mode(tmp_path_factory) -> FakeTensorMode:
    """A mode in which tensors on `cuda` are fake."""
    return fake_cuda(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """An engine sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_of(golden_case, keep_threads) -> Callable[[str], CapturedHNet]:
    """`model_of(name)`: a golden case whose steps are replayed by the emulator."""

    def build(name: str) -> CapturedHNet:
        case = golden_case(name)
        return captured(case.config, case.weights, EmulatedGraphs(spoils=True), most_graphs=5)

    return build
