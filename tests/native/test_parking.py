"""Rows that wait at a boundary: whoever steps with whom, and however long a row is parked, its numbers are its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hnet_runtime.model.hierarchy import HNet

TEXT = b"\xfeIt was a bright cold day in April, and 13 clocks were striking. \xc3\xa9\xff zzzzzzzz"
NUMBERS = ["float32", "bfloat16", "int8"]


def new_rows(model, count: int):
    state = model.new_state(num_rows=count, kv_positions=count * 128, max_positions=128)
    for pool in state.page_pools:
        for row in range(1, count + 1):
            pool.reserve(row, 128)
    return state


def heard_alone(model, text: bytes):
    """Logits of every byte, and every stage's verdicts as {byte offset: (p, boundary)}, of the whole text at once."""
    result = model.run(new_rows(model, 1), [1], [text], [len(text)])
    verdicts = [
        dict(zip(v.offsets.tolist(), zip(v.p.tolist(), v.boundary.tolist(), strict=True), strict=True))
        for v in result.verdicts
    ]
    return result.logits, verdicts


def play(model, texts: dict[int, bytes], rng: random.Random, parks) -> dict[int, tuple[list, list]]:
    """Feeds texts byte by byte: at each turn some rows of one lane step, those at a boundary waiting or not."""
    state = new_rows(model, len(texts))
    num_stages = len(state.stages)
    logits = {row: [] for row in texts}
    verdicts = {row: [{} for _ in range(num_stages - 1)] for row in texts}
    due = dict.fromkeys(texts, 0)  # the stage at which each row runs next
    fed = dict.fromkeys(texts, 0)
    while left := [row for row in texts if fed[row] < len(texts[row]) or due[row]]:
        stage = due[rng.choice(left)]
        lane = [row for row in left if due[row] == stage]
        rows = rng.sample(lane, rng.randrange(1, len(lane) + 1))
        before = [np.copy(arenas.positions) for arenas in state.stages]
        data = b"" if stage else bytes(texts[row][fed[row]] for row in rows)
        result = model.step(state, rows, data, stage=stage, parks=parks(rng))
        for row in rows if not stage else ():
            fed[row] += 1
        for index, said in result.verdicts:
            for row, offset, p, boundary in zip(said.rows, said.offsets, said.p, said.boundary, strict=True):
                verdicts[row][index][int(offset)] = (float(p), bool(boundary))
        ended = [row for row, done in zip(rows, result.finished, strict=True) if done]
        for row, values in zip(ended, result.logits, strict=True):
            logits[row].append(values.clone())
        for row in rows:
            due[row] = 0 if row in ended else stage + 1
        others = [row for row in texts if row not in rows]
        for arenas, earlier in zip(state.stages, before, strict=True):
            assert np.array_equal(arenas.positions[others], earlier[others])
    return {row: (logits[row], verdicts[row]) for row in texts}


def assert_each_alone(model, rng: random.Random, parks) -> None:
    texts = {row: TEXT[:1] + TEXT[row:][: 20 + 9 * row] for row in range(1, 6)}
    found = play(model, texts, rng, parks)
    for row, text in texts.items():
        logits, verdicts = heard_alone(model, text)
        assert torch.equal(torch.stack(found[row][0]), logits)
        assert found[row][1] == verdicts


CHOICES = {
    "everybody waits": lambda rng: True,
    "nobody waits": lambda rng: False,
    "now and then": lambda rng: rng.random() < 0.5,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_rows_that_wait_hear_what_they_hear_alone(case_named, native_of, numbers, choice):
    for name in ("a_1stage", "b_2stage", "e_iso_T2"):
        model = native_of(*case_named(name), numbers)
        assert_each_alone(model, random.Random(name + choice), CHOICES[choice])


@pytest.mark.parametrize("numbers", NUMBERS)
def test_rows_that_wait_hear_what_they_hear_alone_in_every_layout(generated, native_of, numbers):
    model = native_of(generated.config, generated.weights, numbers)
    for seed in (1, 2):
        assert_each_alone(model, random.Random(seed), CHOICES["now and then"])


@pytest.mark.parametrize("choice", CHOICES)
def test_the_torch_runtime_says_the_same(generated, choice):
    assert_each_alone(HNet(generated.config, generated.weights), random.Random(3), CHOICES[choice])


def test_a_parked_row_has_written_nothing_of_its_decoders(case_named, native_of):
    model = native_of(*case_named("b_2stage"), "float32")
    state = new_rows(model, 1)
    result = model.step(state, [1], TEXT[:1])
    assert result.finished.tolist() == [False]
    assert result.logits.shape == (0, 256)
    assert [work.stage for work in result.work] == [0]
    assert [int(arenas.positions[1]) for arenas in state.stages] == [1, 0, 0]
    outer = state.stages[0]
    assert not outer.ema[1].any()
    for layer in outer.stacks["decoder"]:
        assert not layer.conv[1].any()
        assert not layer.ssm[1].any()
    assert outer.parked[1].any()
    assert outer.parked_p[1] == 1.0
