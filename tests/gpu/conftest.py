"""Fixtures of the proofs that need no GPU."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu.fake_cuda import fake_cuda


@pytest.fixture(scope="session")
def fake_mode(tmp_path_factory) -> FakeTensorMode:
    """A mode in which tensors on `cuda` are fake."""
    return fake_cuda(tmp_path_factory.mktemp("guard"))
