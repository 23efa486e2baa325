"""Every kind of step of real models through the proofs, and defects planted in its operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hnet_runtime.config import ModelConfig, official_names
from hnet_runtime.model.captured import step_kinds
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.step_ops import StepOps
from tests.gpu.allow_list import NotCapturable
from tests.gpu.proofs import prove_capturable, prove_padding, prove_replay, prove_state
from tests.gpu.steps import ROWS, StepSubject, captured, declared_state, fake_model, shortened, step_together

GOLDEN = ("b_2stage", "e_iso_T2", "g_2stage_bf16")


def kinds_of(config: ModelConfig) -> list[tuple[int, bool]]:
    return step_kinds(len(config.stages))


@pytest.mark.parametrize("name", official_names())
def test_every_step_of_the_official_models_can_be_captured(fake_mode, name):
    config = shortened(ModelConfig.official(name))
    with fake_mode:
        model = fake_model(config, torch.bfloat16)
        for stage, parks in kinds_of(config):
            prove_capturable(lambda _, at=(stage, parks): StepSubject(model, *at), fake_mode, 4)


def test_every_step_of_every_layout_can_be_captured(fake_mode, generated):
    with fake_mode:
        model = fake_model(generated.config, torch.float32)
        for stage, parks in kinds_of(generated.config):
            prove_capturable(lambda _, at=(stage, parks): StepSubject(model, *at), fake_mode, 2)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_step_writes_the_state_of_its_kind_and_no_other(golden_case, name):
    case = golden_case(name)
    model = captured(case.config, case.weights)
    for stage, parks in kinds_of(case.config):
        subject = StepSubject(model, stage, parks)
        expected = declared_state(subject.arenas, list(subject.state), stage, parks)
        prove_state(lambda _, at=(stage, parks): StepSubject(model, *at), 4, 4, expected)


@pytest.mark.parametrize("name", GOLDEN)
def test_padding_reaches_no_row(golden_case, name):
    case = golden_case(name)
    model = captured(case.config, case.weights)
    for stage, parks in kinds_of(case.config):
        prove_padding(lambda _, at=(stage, parks): StepSubject(model, *at), 4, 6, 5)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_replay_is_the_step(golden_case, name):
    case = golden_case(name)
    model = captured(case.config, case.weights)
    for stage, parks in kinds_of(case.config):
        prove_replay(lambda _, at=(stage, parks): StepSubject(model, *at), 4, 4)


# ── defects in the operations of a real step ──────────────────────────────────────────────────

TORCH = StepOps.torch()


def rebound_conv(x, state, rows, weight, bias):
    return TORCH.conv_step(x, state.clone(), rows, weight, bias)


def scan_that_waits(xbc, dt, a, dt_bias, d, state, rows):
    if xbc.isfinite().all():
        return TORCH.ssm_step(xbc, dt, a, dt_bias, d, state, rows)
    return xbc


def descent_by_mask(p, rows, encoded, pad, report):
    opened = (p > 0.5) & (rows > 0)
    inner = rows[opened]
    return encoded[opened], inner, opened, opened.cumsum(0) - 1, encoded.float()


def descent_padded_by_the_last_row(p, rows, encoded, pad, report):
    h, inner, *others = TORCH.descend_step(p, rows, encoded, pad, report)
    return h, torch.where(inner > 0, inner, ROWS), *others


def rebound_park(p, rows, encoded, parked, parked_p, report):
    return TORCH.park_step(p, rows, encoded, parked.clone(), parked_p, report)


def park_that_goes_on_with_all(p, rows, encoded, parked, parked_p, report):
    """Goes on with rows that wait, too."""
    TORCH.park_step(p, rows, encoded, parked, parked_p, report)
    return encoded.float(), rows, torch.arange(len(rows))


def norm_over_the_batch(h, residual, weight, begins):
    normed = TORCH.add_rms_norm(h, residual, weight, begins)
    return normed - normed.mean(0, keepdim=True)


def stream_that_goes_on(h, residual, weight, begins):
    """Takes what its memory holds for the residual stream's beginning."""
    return TORCH.add_rms_norm(h, residual, weight, False)


def places_counted_by_python(rows, positions, table, capacity):
    """A position more at each call, and none where nobody calls."""
    at, slots = TORCH.next_places(rows, positions, table, capacity)
    places_counted_by_python.calls += 1
    return torch.zeros_like(at) + places_counted_by_python.calls, slots


places_counted_by_python.calls = 0


def average_of_every_row(z, place, p, opened, memory, rows, residual):
    """Takes in a chunk for rows that opened none."""
    return TORCH.ema_step(z, place, p, rows >= 0, memory, rows, residual)


def position_of_the_capture(qkv, positions, slots, k_store, v_store, rotary_dim):
    """Turned by a number that Python counts."""
    position_of_the_capture.calls += 1
    told = torch.zeros_like(positions) + position_of_the_capture.calls
    return TORCH.rotate_and_keep(qkv, told, slots, k_store, v_store, rotary_dim)


position_of_the_capture.calls = 0


PLANTED = [
    ("conv_step", rebound_conv, "state"),
    ("ssm_step", scan_that_waits, "capture"),
    ("descend_step", descent_by_mask, "capture"),
    ("descend_step", descent_padded_by_the_last_row, "padding"),
    ("park_step", rebound_park, "state"),
    ("park_step", park_that_goes_on_with_all, "truth"),
    ("add_rms_norm", norm_over_the_batch, "padding"),
    ("add_rms_norm", stream_that_goes_on, "replay"),
    ("rotate_and_keep", position_of_the_capture, "replay"),
    ("next_places", places_counted_by_python, "replay"),
    ("ema_step", average_of_every_row, "truth"),
]


@pytest.mark.parametrize(
    ("operation", "defect", "caught_by"), PLANTED, ids=lambda each: getattr(each, "__name__", each)
)
def test_a_defect_in_an_operation_is_caught(fake_mode, golden_case, operation, defect, caught_by):
    case = golden_case("b_2stage")
    parks = operation == "park_step"
    ops = replace(TORCH, **{operation: defect})
    if caught_by == "capture":
        with fake_mode:
            model = fake_model(case.config, torch.float32, ops)
            with pytest.raises(NotCapturable):
                prove_capturable(lambda _: StepSubject(model, 0, parks), fake_mode, 4)
        return
    model = captured(case.config, case.weights, ops=ops)

    def make(_: str) -> StepSubject:
        return StepSubject(model, 0, parks)

    subject = make("cpu")
    proofs = {
        "state": lambda: prove_state(make, 4, 4, declared_state(subject.arenas, list(subject.state), 0, parks)),
        "padding": lambda: prove_padding(make, 4, ROWS, 5),
        "replay": lambda: prove_replay(make, 4, 4),
        "truth": lambda: step_together(model, HNet(case.config, case.weights), 1, lambda rng: parks),
    }
    with pytest.raises(AssertionError):
        proofs[caught_by]()
