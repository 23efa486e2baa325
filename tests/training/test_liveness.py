"""What liveness says of models that are known to be dead, or alive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.forward import TrainableHNet
from training.liveness import _of_another_span, _of_the_chunk_before, measure
from training.parallel_ops import equal_spans
from training.windows import BOS


def windows_of(ids: torch.Tensor, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    cut = ids[: count * length].view(count, length)
    windows = torch.cat((torch.full((count, 1), BOS), cut[:, :-1]), 1)
    return windows, cut


def test_a_dead_network_costs_nothing_and_a_live_one_does(golden_case, sample_ids) -> None:
    case = golden_case("a_1stage")
    windows, targets = windows_of(sample_ids, 4, 60)
    alive = measure(TrainableHNet(case.config, case.weights), windows, targets, micro=2)
    assert alive.bits_per_byte > 0
    assert all(abs(bits - alive.bits_per_byte) > 1e-3 for bits in alive.stages[0].bits.values())

    dead = dict(case.weights)
    norm = case.config.stages[1].stack("main").prefix + ".rmsnorm.weight"
    dead[norm] = torch.zeros_like(dead[norm])
    found = measure(TrainableHNet(case.config, dead), windows, targets, micro=2)
    assert all(abs(bits - found.bits_per_byte) < 1e-6 for bits in found.stages[0].bits.values())


def test_bits_are_the_cross_entropy_of_what_the_forward_says(golden_case, sample_ids) -> None:
    case = golden_case("b_2stage")
    windows, targets = windows_of(sample_ids, 3, 70)
    model = TrainableHNet(case.config, case.weights)
    logits = model.forward(windows).logits
    nats = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))
    found = measure(model, windows, targets, micro=2)
    assert found.bits_per_byte == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    assert len(found.stages) == 2
    forwarded = model.forward(windows)
    for stage, route in zip(found.stages, forwarded.routes, strict=True):
        assert stage.bytes_per_chunk == pytest.approx(windows.numel() / route.inner.total)
    assert found.stages[1].bytes_per_chunk > found.stages[0].bytes_per_chunk


def test_chunks_at_white_space_are_counted_by_the_bytes_that_open_them(golden_case) -> None:
    """Words of one letter, and whatever the router makes of them, counted again by hand."""
    case = golden_case("a_1stage")
    model = TrainableHNet(case.config, case.weights)
    text = torch.tensor([list(b"aaaa bbbb cccc dddd " * 3)] * 2)
    windows, targets = windows_of(text.reshape(-1), 2, 60)
    found = measure(model, windows, targets)
    route = model.forward(windows).routes[0]
    opens = windows.t().reshape(-1).numpy()
    chosen = np.flatnonzero(route.boundary & (route.spans.position_of > 0))
    at = [opens[place] == 32 or opens[place - 2] == 32 for place in chosen]
    assert found.stages[0].at_space == pytest.approx(sum(at) / len(at))
    assert found.stages[0].at_punctuation == 0


def test_another_windows_place_is_the_same_time_there() -> None:
    spans = equal_spans(3, 5, torch.device("cpu"))
    index = _of_another_span(spans)
    assert index.tolist() == [time * 3 + (window + 1) % 3 for time in range(5) for window in range(3)]


def test_the_chunk_before_is_of_the_same_window(golden_case, sample_ids) -> None:
    case = golden_case("b_2stage")
    windows, _ = windows_of(sample_ids, 3, 70)
    for route in TrainableHNet(case.config, case.weights).forward(windows).routes:
        before = _of_the_chunk_before(route)
        span, time = route.spans.span_of, route.inner.time_of[route.chunk]
        assert (span[before] == span).all()
        assert (route.inner.time_of[route.chunk[before]] == np.maximum(time - 1, 0)).all()
