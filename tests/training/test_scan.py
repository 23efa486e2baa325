"""The native scan of training against the form in plain torch, and what is done without a compiler."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from training import scan
from training.parallel_ops import blocked_scan


@pytest.fixture
def native() -> None:
    if not scan.is_available():
        pytest.skip("no C++ compiler here")


def drawn(times: int, rows: int, heads: int, states: int, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    dt = torch.rand(times, rows, heads, generator=random) * 0.3
    a = -torch.rand(heads, generator=random) * 8
    return [normal(times, rows, heads, 64), dt, a, normal(times, rows, states), normal(times, rows, states)]


@pytest.mark.parametrize(
    ("times", "rows", "heads", "states"), [(1, 1, 1, 1), (31, 2, 3, 8), (32, 1, 2, 16), (97, 3, 2, 64)]
)
@pytest.mark.usefixtures("native")
def test_both_forms_and_their_gradients_agree(times: int, rows: int, heads: int, states: int) -> None:
    inputs = drawn(times, rows, heads, states, seed=times)
    weights = torch.randn(times, rows, heads, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for form, dtype in ((scan.scan, torch.float32), (blocked_scan, torch.float64)):
        leaves = [each.clone().to(dtype).detach().requires_grad_() for each in inputs]
        y = form(*leaves)
        (y * weights.to(dtype)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, ours, truth in zip(("y", "x", "dt", "a", "b", "c"), *results, strict=True):
        assert (ours - truth).abs().max() <= 2e-5 * truth.abs().max().clamp(min=1), name


@pytest.mark.usefixtures("native")
def test_the_same_inputs_give_the_same_bits() -> None:
    def gradients() -> list[Tensor]:
        leaves = [each.requires_grad_() for each in drawn(70, 2, 2, 16, seed=4)]
        scan.scan(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for one, two in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, two)


def test_without_a_compiler_it_is_said_once_and_torch_serves(monkeypatch, caplog, tmp_path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scan._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not scan.is_available()
            assert not scan.is_available()
        assert [record.message for record in caplog.records if "native scan" in record.message] == [
            "training without its native scan, several times slower:"
            f" CXX={tmp_path}/no-such-compiler is no C++ compiler"
        ]
    finally:
        scan._library.cache_clear()
