"""Bytes drawn inside the step are the sampler's, and rows that the step cannot draw for are drawn after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hnet_runtime.engine import utf8
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import CapturedSampler, RowSampling, Sampler
from hnet_runtime.model.hierarchy import HNet
from tests.engine.conftest import Driver
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.steps import captured, new_rows

CPU = torch.device("cpu")
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.02},
    {"temperature": 2.0},
    {"temperature": 0.1, "top_p": 0.5, "top_k": 40},
]


def some_rows(count: int, seed: int) -> list[RowSampling]:
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        allowed = None if index % 3 else generator.random(256) < 0.3
        if allowed is not None:
            allowed[65] = True
        rows.append(
            RowSampling(SamplingParams(**PARAMS[index % len(PARAMS)]), utf8.ANY_BYTE, generator.random(), allowed)
        )
    return rows


@pytest.mark.parametrize("parks", [False, True])
def test_a_step_draws_what_the_sampler_draws_by_its_logits(golden_case, parks):
    """At whatever stage the rows' bytes come to their end."""
    case = golden_case("b_2stage")
    model = captured(case.config, case.weights, EmulatedGraphs(spoils=True), most_graphs=5)
    state = new_rows(model, 5)
    sampler, twin = CapturedSampler(CPU, model.draws(state)), Sampler(CPU)
    due = dict.fromkeys((4, 1, 2, 5, 3), 0)
    drawn = [0, 0, 0]
    for turn in range(24):
        stage = max(due.values()) if turn % 3 == 2 else min(due.values())
        chosen = [row for row in due if due[row] == stage]
        rows = some_rows(len(chosen), turn)
        sampler.expect(rows)
        data = b"" if stage else bytes((31 * turn + row) % 256 for row in chosen)
        result = model.step(state, chosen, data, stage=stage, parks=parks)
        due |= {row: 0 if done else stage + 1 for row, done in zip(chosen, result.finished, strict=True)}
        ended = [row for row, done in zip(rows, result.finished, strict=True) if done]
        if ended:
            nothing = torch.full_like(result.logits, float("nan"))  # nobody looks at logits again
            assert sampler.draw(nothing, ended) == twin.draw(result.logits, ended)
            drawn[stage] += len(ended)
    assert all(drawn) if parks else drawn[0] > 0


def test_a_row_that_was_not_expected_is_drawn_by_the_logits_given(golden_case):
    case = golden_case("e_iso_T2")
    model = captured(case.config, case.weights)
    state = new_rows(model, 3)
    sampler, twin = CapturedSampler(CPU, model.draws(state)), Sampler(CPU)
    rows = some_rows(3, 1)
    sampler.expect([rows[0], None, rows[2]])
    logits = model.step(state, [1, 2, 3], b"abc").logits
    assert sampler.draw(logits, rows) == twin.draw(logits, rows)
    other = -logits
    assert sampler.draw(other, rows)[1] == twin.draw(other, rows)[1]


def test_a_row_whose_logits_are_not_finite_has_no_byte_and_others_have(golden_case):
    case = golden_case("e_iso_T2")
    weights = {**case.weights, "embeddings.weight": case.weights["embeddings.weight"].clone()}
    weights["embeddings.weight"][66] = float("nan")
    model = captured(case.config, weights, EmulatedGraphs())
    state = new_rows(model, 3)
    sampler = CapturedSampler(CPU, model.draws(state))
    rows = some_rows(3, 1)
    sampler.expect(rows)
    drawn = sampler.draw(model.step(state, [1, 2, 3], b"ABC").logits, rows)
    assert [byte is None for byte in drawn] == [False, True, False]


@pytest.mark.parametrize("batching", ["lockstep", "aligned"])
def test_requests_of_all_manners_get_what_the_eager_engine_draws(golden_case, keep_threads, batching):
    """Penalties, biases and forbidden words beside plain ones: some are drawn in the step, others after it."""
    case = golden_case("b_2stage")
    manners: list[dict[str, Any]] = [
        *PARAMS,
        {"temperature": 1.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 1.0, "logit_bias": ((101, 3.0), (32, -100.0)), "bad_words": (b"th",)},
        {"temperature": 0.9, "utf8": "raw", "logprobs": 2},
    ]
    heard = []
    for model in (HNet(case.config, case.weights), captured(case.config, case.weights, EmulatedGraphs(spoils=True))):
        config = EngineConfig(max_num_seqs=5, max_model_len=128, threads=1, batching=batching)
        driver = Driver(Engine(model, config=config))
        for index, manner in enumerate(manners):
            driver.submit(str(index), b"\xfeOnce" + bytes([65 + index]), max_tokens=18, seed=index, **manner)
        heard.append({request_id: gathered.substance for request_id, gathered in driver.run().items()})
    assert heard[0] == heard[1]
