"""The native forward beside the torch runtime and the oracle, in every layout: what rows hear, and what they keep."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from hnet_runtime.config import ModelConfig
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.reference import Reference
from hnet_runtime.ops.native import binding

ATOL, P_ATOL = 1.5e-4, 5e-6  # logits of generated models reach about 10


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


# ── the torch runtime ─────────────────────────────────────────────────────────────────────────


@cache
def torch_answers(name: str, config: ModelConfig, ticks: tuple[tuple[tuple[int, bytes], ...], ...], make_case):
    """What the torch runtime says of the same ticks; computed once a model."""
    case = make_case(name)
    return run_ticks(HNet(config, case.weights), ticks)


def run_ticks(model, ticks) -> list[Any]:
    state = model.new_state(num_rows=8, kv_positions=8 * 256, max_positions=256)
    for pool in state.page_pools:
        for row in range(1, 9):
            pool.reserve(row, 256)
    results = []
    for tick in ticks:
        rows, pieces = [row for row, _ in tick], [piece for _, piece in tick]
        results.append(model.run(state, rows, pieces, [len(piece) for piece in pieces]))
    return [*results, state]


def test_every_layout_says_of_a_crowd_what_the_torch_runtime_says(generated, sample_ids, native_of, make_named_case):
    """Logits, verdicts with their rows and offsets, and the work of each stage; and the rows' memory after it."""
    data = bytes(sample_ids.tolist())
    ticks = (
        tuple((row, data[:length]) for row, length in zip((3, 1, 8, 5, 2), (1, 90, 2, 65, 17), strict=True)),
        tuple((row, data[at : at + 1]) for row, at in ((2, 17), (8, 2), (1, 90))),
        ((5, data[65:67]), (8, data[3:40]), (3, data[1:2]), (7, data[:5])),
        tuple((row, data[at : at + 1]) for row, at in ((1, 91), (7, 5))),
    )
    *expected, torch_state = torch_answers(generated.name, generated.config, ticks, make_named_case)
    *found, state = run_ticks(native_of(generated.config, generated.weights), ticks)
    for ours, theirs in zip(found, expected, strict=True):
        assert largest_difference(ours.logits, theirs.logits) <= ATOL
        assert [(w.stage, w.positions) for w in ours.work] == [(w.stage, w.positions) for w in theirs.work]
        assert all(work.seconds >= 0 for work in ours.work)
        assert len(ours.verdicts) == len(theirs.verdicts)
        for own, other in zip(ours.verdicts, theirs.verdicts, strict=True):
            # The torch runtime packs by time, the library by row.
            order, others = np.lexsort((own.offsets, own.rows)), np.lexsort((other.offsets, other.rows))
            for name in ("rows", "offsets", "boundary"):
                assert np.array_equal(getattr(own, name)[order], getattr(other, name)[others]), name
            assert np.abs(own.p[order] - other.p[others]).max() <= P_ATOL
    for stage, other in zip(state.stages, torch_state.stages, strict=True):
        assert np.array_equal(stage.positions, other.positions)
        for own, theirs in zip(stage.tensors(), other.tensors(), strict=True):
            assert largest_difference(own, theirs) <= ATOL


def test_an_override_of_one_opens_a_chunk_at_every_position(golden_case, native_of):
    case = golden_case("b_2stage")
    model = native_of(case.config, case.weights, override=RouterOverride((1.0, 1.0)))
    result, _ = run_ticks(model, (((2, b"\xfeabcdefgh"),),))
    assert [work.positions for work in result.work] == [9, 9, 9]
    assert all(said.boundary.all() for said in result.verdicts)


# ── bfloat16 weights ──────────────────────────────────────────────────────────────────────────

_ORACLES: dict[str, Any] = {}


def first_flip(heard, output) -> tuple[int, float]:
    """Byte offset of the first verdict on which the two differ, and how far from a tie the oracle's was."""
    flips = [(len(output.logits), 0.0)]
    truth = torch.arange(len(output.logits))
    for stage, (p, boundary) in enumerate(zip(output.probabilities, output.boundaries, strict=True)):
        ours = {offset: opens for offset, _, opens in heard.verdicts[stage]}
        for offset, probability, opens in zip(truth.tolist(), p.tolist(), boundary.tolist(), strict=True):
            if ours.get(offset) is not opens and offset < flips[-1][0]:
                flips.append((offset, abs(probability - 0.5)))
        truth = truth[boundary]
    return flips[-1]


def test_bfloat16_weights_lose_keys_values_and_ties_of_the_router_alone(
    generated, sample_ids, native_of, rows_of, weights_in
):
    """Activations stay in fp32. What is left apart from the oracle in fp32 on the same weights are keys and values
    in bfloat16 and, within half a step of a tie, the router's verdict."""
    weights = weights_in(generated.weights, "bfloat16")
    if generated.name not in _ORACLES:
        in_fp32 = weights_in(weights, "float32")
        _ORACLES[generated.name] = Reference(generated.config, in_fp32).forward(sample_ids)
    output = _ORACLES[generated.name]
    heard = rows_of(native_of(generated.config, weights)).run(2, bytes(sample_ids.tolist()), 32)
    flip, from_tie = first_flip(heard, output)
    assert flip >= 30
    assert from_tie <= 2.0**-9 + 1e-3
    assert float((heard.logits - output.logits)[:flip].square().mean().sqrt()) <= 0.02


def test_bfloat16_weights_alone_cost_nothing_but_what_two_parts_of_an_activation_cost(
    make_named_case, sample_ids, library, native_of, rows_of, weights_in
):
    """No attention and no router: as good as float32, and 2⁻¹⁷ of the activations away from it with AMX."""
    case = make_named_case("bytes_through_mamba_alone", dtype=torch.bfloat16)
    output = Reference(case.config, weights_in(case.weights, "float32")).forward(sample_ids)
    heard = rows_of(native_of(case.config, case.weights)).run(2, bytes(sample_ids.tolist()), 32)
    parts = library.calls.hnet_word_multiple(binding.BFLOAT16) > 1
    assert largest_difference(heard.logits, output.logits) <= (4e-4 if parts else 3e-5)
