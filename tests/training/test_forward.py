"""The trainer's forward and its gradients, against the reference and against the runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.model import reference
from training import forward as forward_module
from training.forward import Route, TrainableHNet, confidence, ratio_loss
from training.parallel_ops import equal_spans


def trainable(weights) -> dict[str, Tensor]:
    return {key: tensor.float().clone().requires_grad_() for key, tensor in weights.items()}


def windows_of(ids: Tensor, count: int) -> Tensor:
    """`count` windows cut from `ids` one after another, so that no two are alike."""
    length = len(ids) // count
    return ids[: length * count].view(count, length)


def test_logits_and_boundaries_of_goldens(fp32_golden) -> None:
    model = TrainableHNet(fp32_golden.config, trainable(fp32_golden.weights))
    for prompt in fp32_golden.prompts():
        forwarded = model.forward(prompt.fed_ids[None])
        assert (forwarded.logits[0] - prompt.fed_logits).abs().max() <= fp32_golden.logits_atol
        for route, boundary, p in zip(forwarded.routes, prompt.fed_boundaries, prompt.fed_probabilities, strict=True):
            assert torch.equal(torch.from_numpy(route.boundary), boundary)
            assert (route.p - p).abs().max() <= fp32_golden.probability_atol


def test_windows_beside_each_other_are_as_alone(generated, sample_ids) -> None:
    weights = trainable(generated.weights)
    model = TrainableHNet(generated.config, weights)
    windows = windows_of(sample_ids, 3)
    forwarded = model.forward(windows)
    oracle = reference.Reference(generated.config, generated.weights)
    for window, logits in zip(windows, forwarded.logits, strict=True):
        truth = oracle.forward(window).logits
        assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max().clamp(min=1)


def test_gradients_are_the_references(generated, sample_ids, monkeypatch) -> None:
    """Every parameter's, but for the confidence, which is 1 in the reference: autograd through loops over time, in
    fp64."""
    monkeypatch.setattr(forward_module, "confidence", lambda p, boundary: torch.ones_like(p))
    ids = sample_ids[:40]
    weights = trainable(generated.weights)
    logits = TrainableHNet(generated.config, weights).forward(ids[None]).logits[0]
    F.cross_entropy(logits[:-1], ids[1:]).backward()

    exact = {key: tensor.double().clone().requires_grad_() for key, tensor in generated.weights.items()}
    trace = reference._Trace(False)
    hidden = reference.hnet(exact, generated.config.stages, F.embedding(ids, exact["embeddings.weight"]), trace)
    head = exact["embeddings.weight" if generated.config.tie_embeddings else "lm_head.weight"]
    F.cross_entropy((hidden @ head.t())[:-1], ids[1:]).backward()
    for key, tensor in weights.items():
        truth = exact[key].grad if exact[key].grad is not None else torch.zeros_like(exact[key])
        found = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        scale = truth.abs().max().clamp(min=1e-6)
        assert (found - truth).abs().max() <= 2e-3 * scale, key


def test_confidence_is_one_and_has_the_routers_gradient() -> None:
    p = torch.tensor([0.9, 0.2, 0.5], requires_grad=True)
    boundary = p.detach().numpy() > 0.5
    factor = confidence(p, boundary)
    assert torch.equal(factor, torch.ones(3))
    factor.sum().backward()
    assert p.grad is not None
    assert p.grad.tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(("share", "wanted"), [(0.25, 1.0), (1.0, 4.0), (0.0, 4 / 3)])
def test_ratio_loss_is_one_where_one_in_n_opens(share: float, wanted: float) -> None:
    """Equation (10) with N = 4, F = G = 1/4 gives 1, its least on F = G; all or none cost more."""
    count = 8
    boundary = torch.arange(count).numpy() < share * count
    p = torch.from_numpy(boundary).float()
    spans = equal_spans(1, count, torch.device("cpu"))
    route = Route(spans, spans, p, boundary, torch.arange(count).numpy())
    assert float(ratio_loss(route, 4.0)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["a_1stage", "b_2stage"])
def test_a_window_that_never_opens_a_second_chunk_has_finite_gradients(golden_case, name) -> None:
    case = golden_case(name)
    weights = trainable(case.weights)
    windows = torch.full((2, 40), 97)
    model = TrainableHNet(case.config, weights)
    model.forward(windows).logits.square().mean().backward()
    for key, tensor in weights.items():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), key
