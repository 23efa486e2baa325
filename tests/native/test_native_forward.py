"""The native forward against the record of the authors' implementation, the oracle, and the torch path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.native import NativeHNet
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


# ── every layout ──────────────────────────────────────────────────────────────────────────────

ORACLE_ATOL = 1.5e-4  # logits of generated models reach about 10; 3e-5 is seen
ORACLE_P_ATOL = 5e-6
_ORACLE: dict[tuple[str, int], ReferenceOutput] = {}


def oracle(case, ids: Tensor) -> ReferenceOutput:
    """The oracle's word on the sample text, or more of the like; asked once for all libraries."""
    key = case.name, len(ids)
    if key not in _ORACLE:
        _ORACLE[key] = Reference(case.config, case.weights).forward(ids)
    return _ORACLE[key]


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
    """What is left of bfloat16 beside the weights: keys, values, and the router's rounding, of which come ties."""
    case = make_named_case(name, dtype=torch.bfloat16)
    output = Reference(case.config, weights_in(case.weights, "float32")).forward(sample_ids)
    heard = rows_of(native_of(case.config, case.weights)).run(2, bytes(sample_ids.tolist()), 32)
    until = len(sample_ids)  # what follows a verdict that differs is another sequence
    for stage, (p, boundary) in enumerate(zip(output.probabilities, output.boundaries, strict=True)):
        count = sum(offset < until for offset in heard.offsets(stage))
        found = heard.probabilities(stage)[:count]
        assert largest_difference(found, p[:count]) <= 2**-8
        differ = (heard.boundaries(stage)[:count] != boundary[:count]).nonzero().flatten().tolist()
        assert all(found[at] == 0.5 or abs(p[at] - 0.5) <= 1e-3 for at in differ)
        until = min(until, *(heard.offsets(stage)[at] for at in differ), until)
    assert until >= 20
    assert float((heard.logits[:until] - output.logits[:until]).square().mean().sqrt()) <= 0.03


def test_ties_at_one_half_in_bfloat16_are_no_boundaries(make_named_case, sample_ids, weights_in, native_of, rows_of):
    case = make_named_case("conv_2_expand_3", dtype=torch.bfloat16)
    data = bytes(sample_ids.tolist())
    heard = rows_of(native_of(case.config, case.weights)).run(1, data)
    exact = rows_of(native_of(case.config, weights_in(case.weights, "float32"))).run(1, data)
    tied = heard.probabilities(0) == 0.5
    assert not heard.boundaries(0)[tied].any()
    assert exact.boundaries(0)[tied].any()  # as float32 would have had them


def test_a_context_of_several_pages_and_wraps_agrees_with_the_oracle(make_named_case, sample_ids, native_of, rows_of):
    case = make_named_case("mixed_letters")
    data = (bytes(sample_ids.tolist()) * 3)[:700]
    output = oracle(case, torch.tensor(list(data)))
    assert min(float((p - 0.5).abs().min()) for p in output.probabilities) > 1e-5  # else rounding may decide
    heard = rows_of(native_of(case.config, case.weights), num_rows=2, max_positions=1024).run(1, data, 130)
    assert_heard(heard, output.logits, output.probabilities, output.boundaries, ORACLE_ATOL, ORACLE_P_ATOL)


def test_tied_embeddings_are_the_head(make_named_case, sample_ids, native_of, rows_of):
    case = make_named_case("tied_embeddings")
    untied = ModelConfig.from_dict({**case.config.source, "tie_embeddings": False})
    weights = {**case.weights, "lm_head.weight": case.weights["embeddings.weight"]}
    tied, own = (
        rows_of(native_of(config, tensors)).run(1, bytes(sample_ids.tolist()))
        for config, tensors in ((case.config, case.weights), (untied, weights))
    )
    assert torch.equal(tied.logits, own.logits)


# ── what a forward gives ──────────────────────────────────────────────────────────────────────


def fed(model, pieces: dict[int, bytes], num_logits: list[int]):
    """A fresh state and one forward of the rows."""
    state = model.new_state(num_rows=16, kv_positions=16 * 512, max_positions=512)
    for row in pieces:
        for pool in state.page_pools:
            pool.reserve(row, 512)
    return model.run(state, list(pieces), list(pieces.values()), num_logits)


PIECES = {9: b"\xfeOnce upon a time", 2: b"\xfe", 16: b"\xfe" + bytes(range(40, 120)), 5: b"\xfea b c"}


@pytest.mark.parametrize("wanted", [[1, 1, 1, 1], [0, 1, 40, 0], [17, 0, 3, 6], [0, 0, 0, 0]])
def test_logits_are_those_of_the_last_positions_asked_for_span_after_span(golden_case, native_of, wanted):
    case = golden_case("b_2stage")
    model = native_of(case.config, case.weights)
    everything = torch.split(fed(model, PIECES, [len(piece) for piece in PIECES.values()]).logits, [17, 1, 81, 6])
    expected = torch.cat([logits[len(logits) - count :] for logits, count in zip(everything, wanted, strict=True)])
    assert torch.equal(fed(model, PIECES, wanted).logits, expected)


@pytest.mark.parametrize("name", ["b_2stage", "three_routed_stages", "bytes_through_mamba_alone"])
def test_verdicts_and_work_name_the_positions_that_the_torch_path_names(case_named, native_of, name):
    config, weights = case_named(name)
    wanted = [1] * len(PIECES)
    found, twin = (fed(model, PIECES, wanted) for model in (native_of(config, weights), HNet(config, weights)))
    assert [(work.stage, work.positions) for work in found.work] == [(work.stage, work.positions) for work in twin.work]
    assert all(work.seconds > 0 for work in found.work)
    assert len(found.verdicts) == len(twin.verdicts) == config.num_routed_stages
    for said, truth in zip(found.verdicts, twin.verdicts, strict=True):
        order, twins = np.lexsort((said.offsets, said.rows)), np.lexsort((truth.offsets, truth.rows))
        for field in ("rows", "offsets", "boundary"):
            assert np.array_equal(getattr(said, field)[order], getattr(truth, field)[twins]), field
        assert np.abs(said.p[order] - truth.p[twins]).max() <= ORACLE_P_ATOL


def test_a_step_that_opens_no_chunk_stops_where_it_has_to(golden_case, native_of, rows_of):
    case = golden_case("b_2stage")
    rows, prompt = rows_of(native_of(case.config, case.weights)), case.prompt(2)
    rows.open(1)
    rows.feed({1: bytes(prompt.ids.tolist())})
    reached = set()
    for step in range(64):
        byte = bytes([int(prompt.decode_tokens[step])])
        result = rows.model.run(rows.state, [1], [byte], [1])
        decisions = prompt.decode_boundaries[step].tolist()
        stages = 1 + sum(decision == 1 for decision in decisions)
        assert [work.stage for work in result.work] == list(range(stages))
        assert len(result.verdicts) == min(stages, 2)
        reached.add(stages)
    assert reached == {1, 2, 3}


def test_what_a_forward_gave_stays_when_the_next_one_runs(golden_case, native_of, rows_of):
    case = golden_case("b_2stage")
    rows = rows_of(native_of(case.config, case.weights))
    rows.open(3)
    first = rows.model.run(rows.state, [3], [b"\xfeabc, def"], [9])
    kept = first.logits.clone(), [said.p.copy() for said in first.verdicts]
    rows.model.run(rows.state, [3], [b"ghi jkl,"], [8])
    assert torch.equal(first.logits, kept[0])
    assert all(np.array_equal(said.p, p) for said, p in zip(first.verdicts, kept[1], strict=True))


def test_two_states_of_one_model_know_nothing_of_each_other(case_named, native_of, rows_of):
    model = native_of(*case_named("b_2stage"))
    expected = rows_of(model).run(1, TEXT)
    first, second = rows_of(model, num_rows=3), rows_of(model, num_rows=5, max_positions=256)
    for rows in (first, second):
        rows.open(1)
    for begin in range(0, len(TEXT), 10):
        first.feed({1: TEXT[begin : begin + 10]})
        second.feed({1: TEXT[begin : begin + 10]})
    for rows in (first, second):
        assert torch.equal(rows.close(1).logits, expected.logits)


def test_a_model_takes_every_tensor_and_no_packed_byte_twice(case_named, native_of, library):
    config, weights = case_named("b_2stage")
    taken = {key: tensor.clone() for key, tensor in weights.items()}
    matrices = sum(tensor.numel() for tensor in weights.values() if tensor.dim() == 2)
    model = NativeHNet(config, taken, library.calls, 1, isa=library.isa)
    assert not taken
    assert model.kernels == f"native {library.isa}"
    assert 4 * matrices * 0.9 <= model.weight_bytes <= 4 * matrices * 1.1


# ── the router overridden ─────────────────────────────────────────────────────────────────────

TEXT = b"\xfe" + b"The quick brown fox jumps over the lazy dog while 17 owls watch. " * 2


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "int8"])
def test_an_overridden_router_opens_the_chunks_that_it_opens_in_the_torch_path(
    case_named, weights_in, native_of, rows_of, numbers
):
    config, weights = case_named("b_2stage")
    override = RouterOverride((4.7, 1.9), seed=2**63 + 11)
    native = rows_of(native_of(config, weights, numbers, override=override))
    twin = rows_of(HNet(config, weights_in(weights, "float32"), override))
    for rows in (native, twin):
        for row in (1, 7, 16):
            rows.open(row)
        rows.feed({7: TEXT[:50], 1: TEXT[:1]})
        rows.feed({16: TEXT, 7: TEXT[50:60]})
        for begin in range(1, 40):
            rows.feed({1: TEXT[begin : begin + 1], 7: TEXT[60 + begin : 61 + begin]})
    for row in (1, 7, 16):
        assert native.heard[row].verdicts == twin.heard[row].verdicts
        assert {p for _, p, _ in native.heard[row].verdicts[0]} == {P_BOUNDARY, P_NONE}
        if numbers == "float32":
            assert largest_difference(native.heard[row].logits, twin.heard[row].logits) <= ORACLE_ATOL
    seen = [{offset for offset, _, opens in native.heard[row].verdicts[0][:60] if opens} for row in (7, 16)]
    assert seen[0] != seen[1]  # rows are drawn on their own


def test_an_override_has_the_rate_it_states(case_named, native_of, rows_of):
    override = RouterOverride((5.0, 2.0), seed=3)
    rows = rows_of(native_of(*case_named("b_2stage"), override=override), num_rows=12)
    for row in range(1, 13):
        rows.open(row)
    rows.feed(dict.fromkeys(range(1, 13), b"\xfe" + b"abcd" * 100))
    opened = [torch.cat([rows.heard[row].boundaries(stage).float() for row in range(1, 13)]) for stage in (0, 1)]
    for found, rate in zip(opened, (0.2, 0.5), strict=True):
        assert abs(float(found.mean()) - rate) <= 4 * math.sqrt(rate * (1 - rate) / len(found)) + 12 / len(found)
