"""Fixtures of the proofs that need no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu.fake_cuda import fake_cuda


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
