"""The runtime against what the authors' implementation recorded, and against the oracle on every layout."""

from __future__ import annotations

import math

import pytest
import torch

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.reference import Reference

SPANS = [1, 7, 64, None]


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def assert_heard(heard, logits, probabilities, boundaries, case) -> None:
    assert largest_difference(heard.logits, logits) <= case.logits_atol
    for stage, (p, b) in enumerate(zip(probabilities, boundaries, strict=True)):
        assert torch.equal(heard.boundaries(stage), b), f"stage {stage}"
        assert largest_difference(heard.probabilities(stage), p) <= case.probability_atol, f"stage {stage}"


# ── fp32 golden cases ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("span", SPANS)
def test_prompts_in_spans_give_the_recorded_logits_and_verdicts(fp32_golden, model_of, rows_of, span):
    rows = rows_of(model_of(fp32_golden.config, fp32_golden.weights))
    for prompt in fp32_golden.prompts():
        heard = rows.run(3, bytes(prompt.ids.tolist()), span)
        assert_heard(heard, prompt.prefill_logits, prompt.probabilities, prompt.boundaries, fp32_golden)


def test_prompts_packed_into_one_forward_give_the_recorded_logits_and_verdicts(fp32_golden, model_of, rows_of):
    rows = rows_of(model_of(fp32_golden.config, fp32_golden.weights))
    prompts = dict(zip((5, 2, 9, 4), fp32_golden.prompts(), strict=True))
    for row in prompts:
        rows.open(row)
    rows.feed({row: bytes(prompt.ids.tolist()) for row, prompt in prompts.items()})
    for row, prompt in prompts.items():
        assert_heard(rows.heard[row], prompt.prefill_logits, prompt.probabilities, prompt.boundaries, fp32_golden)


def test_a_verdict_carries_the_offset_of_the_first_byte_of_its_position(fp32_golden, model_of, rows_of):
    rows = rows_of(model_of(fp32_golden.config, fp32_golden.weights))
    for prompt in fp32_golden.prompts():
        heard = rows.run(1, bytes(prompt.ids.tolist()), 11)
        offsets = torch.arange(len(prompt.ids))
        for stage, boundary in enumerate(prompt.boundaries):
            assert heard.offsets(stage) == offsets.tolist()
            offsets = offsets[boundary]


@pytest.mark.parametrize("span", SPANS)
def test_greedy_steps_of_all_prompts_together_are_the_recorded_ones(fp32_golden, model_of, rows_of, span):
    rows = rows_of(model_of(fp32_golden.config, fp32_golden.weights))
    prompts = dict(zip((2, 7, 1, 16), fp32_golden.prompts(), strict=True))
    for row, prompt in prompts.items():
        ids = bytes(prompt.ids.tolist())
        rows.open(row)
        for begin in range(0, len(ids), span or len(ids)):
            rows.feed({row: ids[begin : begin + (span or len(ids))]})
    for step in range(64):
        newest = {row: int(rows.heard[row].logits[-1].argmax()) for row in prompts}
        assert newest == {row: int(prompt.decode_tokens[step]) for row, prompt in prompts.items()}
        before = {row: [len(said) for said in rows.heard[row].verdicts] for row in prompts}
        rows.feed({row: bytes([byte]) for row, byte in newest.items()})
        for row, prompt in prompts.items():
            heard = rows.heard[row]
            assert largest_difference(heard.logits[-1], prompt.decode_logits[step]) <= fp32_golden.logits_atol
            for stage, said in enumerate(heard.verdicts):
                decision = int(prompt.decode_boundaries[step, stage])
                new = said[before[row][stage] :]
                assert [int(boundary) for _, _, boundary in new] == ([] if decision == -1 else [decision])
                if new:
                    offset, p, _ = new[0]
                    assert offset == len(prompt.ids) + step
                    assert abs(p - float(prompt.decode_probabilities[step, stage])) <= fp32_golden.probability_atol
    for row, prompt in prompts.items():
        assert int(rows.heard[row].logits[-1].argmax()) == int(prompt.decode_tokens[64])


# ── bfloat16, teacher-forced ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("span", SPANS)
def test_bfloat16_stays_as_near_to_the_record_as_rounding_allows(bf16_golden, model_of, rows_of, span):
    rows = rows_of(model_of(bf16_golden.config, bf16_golden.weights))
    squares, same, flips, positions, verdicts = 0.0, 0, 0, 0, 0
    for prompt in bf16_golden.prompts():
        heard = rows.run(2, bytes(prompt.fed_ids.tolist()), span)
        assert heard.logits.dtype == torch.float32
        squares += float((heard.logits - prompt.fed_logits).square().sum())
        same += int((heard.logits.argmax(dim=1) == prompt.fed_logits.argmax(dim=1)).sum())
        positions += len(prompt.fed_ids)
        flips += int((heard.boundaries(0) != prompt.fed_boundaries[0]).sum())
        verdicts += len(prompt.fed_boundaries[0])
        if torch.equal(heard.boundaries(0), prompt.fed_boundaries[0]):  # only then stage 1 has the same positions
            flips += int((heard.boundaries(1) != prompt.fed_boundaries[1]).sum())
            verdicts += len(prompt.fed_boundaries[1])
    rms, agreement, flipped = math.sqrt(squares / (positions * 256)), same / positions, flips / verdicts
    assert positions > 600  # all four prompts and their 64 steps each
    # What rounding allows,
    assert rms <= 0.5
    assert agreement >= 0.75
    assert flipped <= 0.01
    # and what is reached: a guard against drifting away from the record unnoticed.
    assert rms <= 0.1
    assert agreement >= 0.9


def test_bfloat16_ties_of_the_record_are_no_boundaries_here(bf16_golden, model_of, rows_of):
    rows = rows_of(model_of(bf16_golden.config, bf16_golden.weights))
    ties = 0
    for prompt in bf16_golden.prompts():
        heard = rows.run(1, bytes(prompt.fed_ids.tolist()))
        tied = prompt.fed_probabilities[0] == 0.5
        ties += int(tied.sum())
        assert not heard.boundaries(0)[tied].any()
    assert ties > 0


# ── every layout, against the oracle ──────────────────────────────────────────────────────────

ORACLE_ATOL = 1.5e-4  # logits of generated models reach about 10; 3e-5 is seen
ORACLE_P_ATOL = 5e-6


def assert_like_oracle(heard, output) -> None:
    assert largest_difference(heard.logits, output.logits) <= ORACLE_ATOL
    for stage, (p, b) in enumerate(zip(output.probabilities, output.boundaries, strict=True)):
        assert torch.equal(heard.boundaries(stage), b), f"stage {stage}"
        assert largest_difference(heard.probabilities(stage), p) <= ORACLE_P_ATOL, f"stage {stage}"


@pytest.mark.parametrize("span", [None, 7])
def test_every_layout_agrees_with_the_oracle_in_spans(generated, sample_ids, model_of, rows_of, span):
    output = Reference(generated.config, generated.weights).forward(sample_ids)
    heard = rows_of(model_of(generated.config, generated.weights)).run(4, bytes(sample_ids.tolist()), span)
    assert_like_oracle(heard, output)


def test_every_layout_agrees_with_the_oracle_step_by_step_after_a_prompt(generated, sample_ids, model_of, rows_of):
    output = Reference(generated.config, generated.weights).forward(sample_ids)
    rows, data = rows_of(model_of(generated.config, generated.weights)), bytes(sample_ids.tolist())
    rows.open(16)
    rows.feed({16: data[:150]})
    for byte in data[150:]:
        rows.feed({16: bytes([byte])})
    assert_like_oracle(rows.heard[16], output)


def test_every_layout_agrees_with_the_oracle_for_packed_texts_of_many_lengths(generated, sample_ids, model_of, rows_of):
    model, oracle = model_of(generated.config, generated.weights), Reference(generated.config, generated.weights)
    rows = rows_of(model)
    data = bytes(sample_ids.tolist())
    prefixes = {row: data[:length] for row, length in zip((3, 1, 8, 5, 2), (1, 90, 2, 65, 17), strict=True)}
    for row in prefixes:
        rows.open(row)
    rows.feed(prefixes)
    output = oracle.forward(sample_ids)  # causal: a prefix's numbers are the whole text's first ones
    for row, prefix in prefixes.items():
        heard = rows.heard[row]
        assert largest_difference(heard.logits, output.logits[: len(prefix)]) <= ORACLE_ATOL
        count = len(prefix)
        for stage, boundary in enumerate(output.boundaries):
            assert torch.equal(heard.boundaries(stage), boundary[:count])
            count = int(boundary[:count].sum())


def test_tied_embeddings_are_the_head(make_named_case, sample_ids, model_of, rows_of):
    case = make_named_case("tied_embeddings")
    untied = ModelConfig.from_dict({**case.config.source, "tie_embeddings": False})
    weights = {**case.weights, "lm_head.weight": case.weights["embeddings.weight"]}
    heard = [
        rows_of(model_of(config, tensors)).run(1, bytes(sample_ids.tolist()))
        for config, tensors in ((case.config, case.weights), (untied, weights))
    ]
    assert torch.equal(heard[0].logits, heard[1].logits)


@pytest.mark.parametrize("name", ["three_routed_stages", "mixed_letters", "odd_head_dims", "conv_2_expand_3"])
def test_bfloat16_layouts_agree_with_the_oracle_within_rounding(make_named_case, sample_ids, model_of, rows_of, name):
    case = make_named_case(name, dtype=torch.bfloat16)
    output = Reference(case.config, case.weights).forward(sample_ids)
    heard = rows_of(model_of(case.config, case.weights)).run(2, bytes(sample_ids.tolist()), 32)
    agree = heard.boundaries(0) == output.boundaries[0]
    assert float(agree.float().mean()) >= 0.98  # a verdict near a tie may fall either way
    assert float((heard.logits - output.logits.float()).square().mean().sqrt()) <= 0.5


def test_a_context_of_several_blocks_and_wraps_agrees_with_the_oracle(make_named_case, sample_ids, model_of, rows_of):
    case = make_named_case("mixed_letters")
    data = (bytes(sample_ids.tolist()) * 4)[:900]
    output = Reference(case.config, case.weights).forward(torch.tensor(list(data)))
    nearest = min(float((p - 0.5).abs().min()) for p in output.probabilities)
    assert nearest > 1e-5  # or boundaries could differ by rounding alone
    heard = rows_of(model_of(case.config, case.weights), num_rows=2, max_positions=1024).run(1, data, 130)
    assert_like_oracle(heard, output)
