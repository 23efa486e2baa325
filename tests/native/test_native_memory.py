"""Whose memory is whose: a row leaves what its bytes alone say, writes nowhere else, and reads nothing but its own.

In float32, bfloat16 and 8 bits, on every instruction set, to the bit; and in crowds that come and go.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hnet_runtime.state.arenas import Mamba2State
from hnet_runtime.state.rows import RingSlots
from tests import crowds
from tests.crowds import assert_same, crowd_against_alone

MODELS = ["a_1stage", "b_2stage", "e_iso_T2", "mixed_letters", "odd_head_dims"]
NUMBERS = ["float32", "bfloat16", "int8", "int8_bfloat16"]
MAX_POSITIONS = 256


def fast(values: list[Any], *few: Any) -> list[Any]:
    """The values, all but a few of them for the slow run."""
    return [value if value in few else pytest.param(value, marks=pytest.mark.slow) for value in values]


TEXTS = crowds.TEXTS[:11]


@pytest.fixture(params=fast(NUMBERS, "float32", "bfloat16", "int8"))
def numbers(request: pytest.FixtureRequest) -> str:
    return request.param


class Subject:
    """A model in some numbers on some library, and what each text gives alone and whole, computed once."""

    def __init__(self, model: Any, rows_of: Any) -> None:
        self.model, self._rows_of = model, rows_of
        self._alone: dict[bytes, Any] = {}

    def rows(self, num_rows: int = 4) -> Any:
        return self._rows_of(self.model, num_rows, MAX_POSITIONS)

    def alone(self, text: bytes) -> Any:
        if text not in self._alone:
            self._alone[text] = self.rows(1).run(1, text)
        return self._alone[text]


_SUBJECTS: dict[tuple[str, ...], Subject] = {}


@pytest.fixture
def subject_named(case_named, library, native_of, rows_of) -> Callable[[str, str], Subject]:
    """`subject_named(name, numbers)`: kept from test to test."""

    def find(name: str, numbers: str) -> Subject:
        key = (library.isa, name, numbers)
        if key not in _SUBJECTS:
            _SUBJECTS[key] = Subject(native_of(*case_named(name), numbers), rows_of)
        return _SUBJECTS[key]

    return find


def memory(rows: Any, row: int) -> list[torch.Tensor]:
    """All that the row carries to its next byte, keys and values in order of position."""
    held = []
    for stage in rows.state.stages:
        count = int(stage.positions[row])
        kept = np.arange(count)
        if isinstance(stage.slots, RingSlots):
            kept = kept[-stage.slots.capacity :]
        for layers in stage.stacks.values():
            for layer in layers:
                if isinstance(layer, Mamba2State):
                    held += [layer.conv[row], layer.ssm[row]]
                else:
                    slots = stage.slots.slots(np.array([[row]]), kept[None, :])[0]
                    held += [layer.k[slots], layer.v[slots]]
        if stage.router is not None:
            held += [stage.router[row], stage.ema[row]]
        held.append(torch.tensor(count))
    return [tensor.clone() for tensor in held]


# ── what a row keeps ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", fast([*MODELS, "demo"], "b_2stage", "mixed_letters"))
def test_a_text_gives_the_same_numbers_and_leaves_the_same_memory_in_spans_of_any_length(subject_named, name, numbers):
    subject = subject_named(name, numbers)
    rows, rng = subject.rows(2), random.Random(5)
    text = TEXTS[3][:130]
    left = []
    for span in (None, 1, 7, 64, "random"):
        rows.open(2)
        at = 0
        while at < len(text):
            size = rng.randrange(1, 50) if span == "random" else span or len(text)
            rows.feed({2: text[at : at + size]})
            at += size
        left.append(memory(rows, 2))
        assert_same(rows.close(2), subject.alone(text))
    for other in left[1:]:
        assert all(torch.equal(one, two) for one, two in zip(other, left[0], strict=True))


def test_a_row_writes_nothing_into_the_memory_of_others(subject_named, numbers):
    subject = subject_named("mixed_letters", numbers)
    rows = subject.rows(3)
    for row in (1, 2, 3):
        rows.open(row)
        rows.feed({row: TEXTS[row + 2][:40]})
    before = [memory(rows, row) for row in (1, 3)]
    padding = [[tensor[0].clone() for tensor in stage.tensors()] for stage in rows.state.stages]
    rows.feed({2: TEXTS[4][40:]})
    rows.feed({2: b"x"})
    for row, held in zip((1, 3), before, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(memory(rows, row), held, strict=True))
    for stage, held in zip(rows.state.stages, padding, strict=True):
        assert all(torch.equal(tensor[0], one) for tensor, one in zip(stage.tensors(), held, strict=True))


def test_two_states_of_a_model_and_two_models_of_a_library_do_not_meet(golden_case, native_of, rows_of):
    a, b = golden_case("a_1stage"), golden_case("b_2stage")
    first = native_of(a.config, a.weights)
    others = [rows_of(first, 2), rows_of(first, 3), rows_of(native_of(b.config, b.weights), 2)]
    data = bytes(a.prompt(2).ids.tolist())[:80]
    alone = [rows_of(rows.model, 1).run(1, data) for rows in others]
    for rows in others:
        rows.open(1)
    for begin in range(0, 80, 8):
        for rows in others:
            rows.feed({1: data[begin : begin + 8]})
    for rows, expected in zip(others, alone, strict=True):
        heard = rows.close(1)
        assert torch.equal(heard.logits, expected.logits)
        assert heard.verdicts == expected.verdicts


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_byte_whose_vector_is_not_finite_spoils_the_rows_that_read_it_from_there_on(
    case_named, native_of, rows_of, weights_in, numbers, value
):
    """Such a row's products meet those of others in one tile, and its activations are quantised beside theirs."""
    config, weights = case_named("b_2stage")
    broken = weights_in(weights, "float32")
    broken["embeddings.weight"] = broken["embeddings.weight"].clone()
    broken["embeddings.weight"][ord("%"), 3] = value
    model = native_of(config, broken, numbers)
    alone = {row: rows_of(model, 1, MAX_POSITIONS).run(1, TEXTS[row + 1]) for row in (1, 3)}
    rows = rows_of(model, 3, MAX_POSITIONS)
    for row in (1, 2, 3):
        rows.open(row)
    rows.feed({1: TEXTS[2][:9], 2: b"\xfe100", 3: TEXTS[4][:5]})
    clean = rows.heard[2].logits
    assert clean.isfinite().all()
    rows.feed({3: TEXTS[4][5:6], 2: b"%", 1: TEXTS[2][9:10]})
    rows.feed({1: TEXTS[2][10:30], 2: b" more", 3: TEXTS[4][6:7]})
    rows.feed({2: b"!", 1: TEXTS[2][30:], 3: TEXTS[4][7:]})
    for row in (1, 3):
        assert_same(rows.close(row), alone[row])
    assert not rows.close(2).logits[4:].isfinite().all(-1).any()


# ── crowds ────────────────────────────────────────────────────────────────────────────────────


def text_of(index: int) -> bytes:
    """A text of its own for each of many rows, 20 to 50 bytes."""
    text = TEXTS[2 + index % 9]
    return text[:1] + text[1 + index // 9 : 20 + (index * 7) % 31 + index // 9]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", [*MODELS, "demo", "three_routed_stages", "window_zero", "state_16_and_48_conv_3"])
def test_a_row_is_bitwise_equal_alone_and_in_a_crowd_that_comes_and_goes(subject_named, name, numbers, seed):
    subject = subject_named(name, numbers)
    crowd_against_alone(subject.rows(16), subject.alone, [*TEXTS, *(text_of(index) for index in range(9, 25))], seed)
