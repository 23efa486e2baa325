"""The native forward against the record of the authors' implementation, the oracle, and the torch path."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.override import P_BOUNDARY, P_NONE, RouterOverride
from hnet_runtime.model.reference import Reference, ReferenceOutput

SPANS = [1, 7, 64, None]


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def assert_heard(heard, logits, probabilities, boundaries, logits_atol: float, p_atol: float) -> None:
    for stage, (p, b) in enumerate(zip(probabilities, boundaries, strict=True)):
        assert torch.equal(heard.boundaries(stage), b), f"stage {stage}"
        assert largest_difference(heard.probabilities(stage), p) <= p_atol, f"stage {stage}"
    assert largest_difference(heard.logits, logits) <= logits_atol


def assert_recorded(heard, prompt, case) -> None:
    tolerances = case.logits_atol, case.probability_atol
    assert_heard(heard, prompt.prefill_logits, prompt.probabilities, prompt.boundaries, *tolerances)


# ── float32 golden cases ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("span", SPANS)
def test_prompts_in_spans_give_the_recorded_logits_and_verdicts(fp32_golden, native_of, rows_of, span):
    rows = rows_of(native_of(fp32_golden.config, fp32_golden.weights))
    for prompt in fp32_golden.prompts():
        heard = rows.run(3, bytes(prompt.ids.tolist()), span)
        assert_recorded(heard, prompt, fp32_golden)
        offsets = torch.arange(len(prompt.ids))
        for stage, boundary in enumerate(prompt.boundaries):
            assert heard.offsets(stage) == offsets.tolist()  # a chunk stands for its first byte
            offsets = offsets[boundary]


def test_prompts_packed_into_one_forward_give_the_recorded_logits_and_verdicts(fp32_golden, native_of, rows_of):
    rows = rows_of(native_of(fp32_golden.config, fp32_golden.weights))
    prompts = dict(zip((5, 2, 9, 4), fp32_golden.prompts(), strict=True))
    for row in prompts:
        rows.open(row)
    rows.feed({row: bytes(prompt.ids.tolist()) for row, prompt in prompts.items()})
    for row, prompt in prompts.items():
        assert_recorded(rows.heard[row], prompt, fp32_golden)


@pytest.mark.parametrize("span", [11, None])
def test_64_greedy_steps_of_all_prompts_together_are_the_recorded_ones(fp32_golden, native_of, rows_of, span):
    rows = rows_of(native_of(fp32_golden.config, fp32_golden.weights))
    prompts = dict(zip((2, 7, 1, 16), fp32_golden.prompts(), strict=True))
    for row, prompt in prompts.items():
        ids = bytes(prompt.ids.tolist())
        rows.open(row)
        for begin in range(0, len(ids), span or len(ids)):
            rows.feed({row: ids[begin : begin + (span or len(ids))]})
    for step in range(65):
        newest = {row: int(rows.heard[row].logits[-1].argmax()) for row in prompts}
        assert newest == {row: int(prompt.decode_tokens[step]) for row, prompt in prompts.items()}
        if step < 64:
            rows.feed({row: bytes([byte]) for row, byte in newest.items()})
    for row, prompt in prompts.items():
        tolerances = fp32_golden.logits_atol, fp32_golden.probability_atol
        truth = prompt.fed_logits, prompt.fed_probabilities, prompt.fed_boundaries
        assert_heard(rows.heard[row], *truth, *tolerances)


# ── bfloat16 ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("span", SPANS)
def test_bfloat16_stays_as_near_to_the_record_as_rounding_allows(bf16_golden, native_of, rows_of, span):
    """Teacher-forced. The record rounds every activation to bfloat16, the kernels round none: the distance is the
    record's own."""
    rows = rows_of(native_of(bf16_golden.config, bf16_golden.weights))
    squares, same, flips, positions, verdicts = 0.0, 0, 0, 0, 0
    for prompt in bf16_golden.prompts():
        heard = rows.run(2, bytes(prompt.fed_ids.tolist()), span)
        squares += float((heard.logits - prompt.fed_logits).square().sum())
        same += int((heard.logits.argmax(dim=1) == prompt.fed_logits.argmax(dim=1)).sum())
        positions += len(prompt.fed_ids)
        flips += int((heard.boundaries(0) != prompt.fed_boundaries[0]).sum())
        verdicts += len(prompt.fed_boundaries[0])
    assert positions > 600
    assert math.sqrt(squares / (positions * 256)) <= 0.5
    assert same / positions >= 0.75
    assert flips / verdicts <= 0.01


def test_ties_at_one_half_in_bfloat16_are_no_boundaries(make_case, native_of, rows_of):
    """k sees what q sees turned by a right angle, so that every cosine is far below bfloat16's steps around 1."""
    config, weights = make_case(5, ["m1", ["m1"], "m1"], [64, 64], dtype=torch.bfloat16)
    turned = torch.zeros(64, 64)
    turned[:32, 32:], turned[32:, :32] = torch.eye(32), -torch.eye(32)
    router = f"{config.stages[0].prefix}.routing_module"
    weights[f"{router}.q_proj_layer.weight"] = torch.eye(64).bfloat16()
    weights[f"{router}.k_proj_layer.weight"] = turned.bfloat16()
    same = b"\xfe" + b"a" * 80  # its vectors soon stand still, and J x is at a right angle to x
    heard = rows_of(native_of(config, weights)).run(1, same)
    tied = heard.probabilities(0) == 0.5
    assert int(tied.sum()) >= 20
    assert not heard.boundaries(0)[tied].any()


# ── every layout ──────────────────────────────────────────────────────────────────────────────

ORACLE_ATOL = 1.5e-4  # logits of generated models reach about 10; 3e-5 is seen
ORACLE_P_ATOL = 5e-6
_ORACLE: dict[str, ReferenceOutput] = {}


def oracle(case, ids: Tensor) -> ReferenceOutput:
    """The oracle's word on the sample text, asked once a model."""
    if case.name not in _ORACLE:
        _ORACLE[case.name] = Reference(case.config, case.weights).forward(ids)
    return _ORACLE[case.name]


@pytest.mark.parametrize("span", [None, 7])
def test_every_layout_agrees_with_the_oracle(generated, sample_ids, native_of, rows_of, span):
    output = oracle(generated, sample_ids)
    heard = rows_of(native_of(generated.config, generated.weights)).run(4, bytes(sample_ids.tolist()), span)
    assert_heard(heard, output.logits, output.probabilities, output.boundaries, ORACLE_ATOL, ORACLE_P_ATOL)


def test_every_layout_agrees_with_the_oracle_step_by_step_beside_others(generated, sample_ids, native_of, rows_of):
    """Five rows hear the same text from different places on; each is the oracle's."""
    output, data = oracle(generated, sample_ids), bytes(sample_ids.tolist())
    rows = rows_of(native_of(generated.config, generated.weights))
    starts = {16: 150, 3: 1, 8: 90, 1: 2, 11: 65}
    for row in starts:
        rows.open(row)
    rows.feed({row: data[:start] for row, start in starts.items()})
    for step in range(60):
        rows.feed({row: data[start + step : start + step + 1] for row, start in starts.items()})
    for row, start in starts.items():
        heard, count = rows.heard[row], start + 60
        assert largest_difference(heard.logits, output.logits[:count]) <= ORACLE_ATOL
        for stage, (p, boundary) in enumerate(zip(output.probabilities, output.boundaries, strict=True)):
            assert torch.equal(heard.boundaries(stage), boundary[:count]), f"stage {stage}"
            assert largest_difference(heard.probabilities(stage), p[:count]) <= ORACLE_P_ATOL
            count = int(boundary[:count].sum())


@pytest.mark.parametrize("name", ["three_routed_stages", "mixed_letters", "odd_head_dims", "conv_2_expand_3"])
def test_bfloat16_layouts_agree_with_the_oracle_in_float32_on_the_same_weights(
    make_named_case, sample_ids, weights_in, native_of, rows_of, name
):
    """What is left of bfloat16 beside the weights: keys, values and the router's one rounding."""
    case = make_named_case(name, dtype=torch.bfloat16)
    output = Reference(case.config, weights_in(case.weights, "float32")).forward(sample_ids)
    heard = rows_of(native_of(case.config, case.weights)).run(2, bytes(sample_ids.tolist()), 32)
    if torch.equal(heard.boundaries(0), output.boundaries[0]):
        assert largest_difference(heard.probabilities(0), output.probabilities[0]) <= 2**-7
    assert int((heard.boundaries(0) != output.boundaries[0]).sum()) <= 1
    assert float((heard.logits - output.logits).square().mean().sqrt()) <= 0.1


def test_a_context_of_several_pages_and_wraps_agrees_with_the_oracle(make_named_case, sample_ids, native_of, rows_of):
    case = make_named_case("mixed_letters")
    data = (bytes(sample_ids.tolist()) * 3)[:700]
    output = _long_oracle(case.name) or _LONG.setdefault(
        case.name, Reference(case.config, case.weights).forward(torch.tensor(list(data)))
    )
    assert min(float((p - 0.5).abs().min()) for p in output.probabilities) > 1e-5  # else rounding may decide
    heard = rows_of(native_of(case.config, case.weights), num_rows=2, max_positions=1024).run(1, data, 130)
    assert_heard(heard, output.logits, output.probabilities, output.boundaries, ORACLE_ATOL, ORACLE_P_ATOL)


_LONG: dict[str, ReferenceOutput] = {}


def _long_oracle(name: str) -> ReferenceOutput | None:
    return _LONG.get(name)
