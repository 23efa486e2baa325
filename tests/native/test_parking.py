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


class Movers:
    """Texts on rows that change: a row is swapped out, its memory spoilt, and it comes back on another one."""

    def __init__(self, state, texts) -> None:
        self._state = state
        self.row_of = {text: text for text in texts}
        self._spare = len(texts) + 1

    def move(self, text: int) -> None:
        state, old, new = self._state, self.row_of[text], self._spare
        swapped = state.swap_out(old)
        for pool in state.page_pools:
            pool.free(old)
        garbage = state.save(new, parked=True)
        garbage.data.copy_(torch.randint(0, 255, garbage.data.shape, dtype=torch.uint8))
        state.load(old, garbage)
        for pages in state.pages:
            pages.pool.reserve(new, 128)
        state.swap_in(new, swapped)
        self.row_of[text], self._spare = new, old


def play_moving(model, texts: dict[int, bytes], rng: random.Random) -> dict[int, list]:
    """Feeds texts byte by byte, rows waiting now and then, and moves rows about in between. Returns their logits."""
    state = model.new_state(num_rows=len(texts) + 1, kv_positions=(len(texts) + 1) * 128, max_positions=128)
    for pool in state.page_pools:
        for row in texts:
            pool.reserve(row, 128)
    movers = Movers(state, texts)
    logits: dict[int, list] = {text: [] for text in texts}
    due, fed = dict.fromkeys(texts, 0), dict.fromkeys(texts, 0)
    while left := [text for text in texts if fed[text] < len(texts[text]) or due[text]]:
        movers.move(rng.choice(left))
        stage = due[rng.choice(left)]
        lane = [text for text in left if due[text] == stage]
        chosen = rng.sample(lane, rng.randrange(1, len(lane) + 1))
        data = b"" if stage else bytes(texts[text][fed[text]] for text in chosen)
        rows = [movers.row_of[text] for text in chosen]
        result = model.step(state, rows, data, stage=stage, parks=rng.random() < 0.7)
        for text in chosen if not stage else ():
            fed[text] += 1
        ended = [text for text, done in zip(chosen, result.finished, strict=True) if done]
        for text, values in zip(ended, result.logits, strict=True):
            logits[text].append(values.clone())
        for text in chosen:
            due[text] = 0 if text in ended else stage + 1
    return logits


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


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "e_iso_T2"])
def test_rows_that_are_swapped_out_and_back_hear_what_they_hear_alone(case_named, native_of, name, numbers):
    """Also rows that wait at a boundary, and onto rows that held something else."""
    model = native_of(*case_named(name), numbers)
    texts = {row: TEXT[:1] + TEXT[row:][: 30 + 9 * row] for row in range(1, 5)}
    found = play_moving(model, texts, random.Random(name))
    for row, text in texts.items():
        assert torch.equal(torch.stack(found[row]), heard_alone(model, text)[0])


def test_the_same_of_rows_in_torch(case_named):
    model = HNet(*case_named("b_2stage"))
    texts = {row: TEXT[:1] + TEXT[row:][:40] for row in range(1, 4)}
    found = play_moving(model, texts, random.Random(5))
    for row, text in texts.items():
        assert torch.equal(torch.stack(found[row]), heard_alone(model, text)[0])
