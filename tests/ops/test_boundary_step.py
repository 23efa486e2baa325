"""What stands around a captured step's boundaries: where rows go, what they leave behind, and what they go on with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hnet_runtime.ops.boundary import descend_step, park_step
from hnet_runtime.ops.drawing import AS_GIVEN, AS_LEFT, MASKS, NUMBERS, draw_step
from hnet_runtime.ops.entry import NO_BYTE, UNREAD, enter_step, resume_step, surface_step
from hnet_runtime.ops.sampling import NOT_FINITE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAN = float("nan")
P = torch.tensor([0.5, 0.9, NAN, 0.1, 0.50001, 1.0])
ROWS = torch.tensor([4, 2, 6, 1, 5, 0])
"""A tie, what is not a number, and padding, which is above the threshold: of these rows 2 and 5 open a chunk."""


@DTYPES
@pytest.mark.parametrize("pad_width", [0, 3])
def test_rows_that_open_a_chunk_go_a_stage_further(noise, dtype, pad_width):
    encoded, report = noise(6, 8).to(dtype), torch.zeros(6)
    pad = noise(pad_width, seed=1).to(dtype) if pad_width else None
    h, inner, opened, chunk, wide = descend_step(P, ROWS, encoded, pad, report)
    assert inner.tolist() == [2, 5, 0, 0, 0, 0]
    assert torch.equal(h[:, :8], encoded[[1, 4, 0, 0, 0, 0]])
    assert pad is None or torch.equal(h[:, 8:], pad.expand(6, -1))
    assert opened.tolist() == [False, True, False, False, True, False]
    assert (int(chunk[1]), int(chunk[4])) == (0, 1)
    assert torch.equal(wide, encoded.float())
    assert torch.equal(report.nan_to_num(7.0), P.nan_to_num(7.0))


@DTYPES
def test_rows_that_open_a_chunk_wait_and_the_others_go_on(noise, dtype):
    encoded, report = noise(6, 8).to(dtype), torch.zeros(6)
    parked, parked_p = noise(7, 8, seed=1).to(dtype), torch.full((7,), 7.0)
    before = parked.clone()
    wide, ended, places = park_step(P, ROWS, encoded, parked, parked_p, report)
    assert ended.tolist() == [4, 6, 1, 0, 0, 0]
    assert places.tolist() == [0, 2, 3, 0, 0, 0]
    assert torch.equal(wide, encoded[places].float())
    assert torch.equal(parked[[2, 5]], encoded[[1, 4]])
    assert torch.equal(parked[[1, 3, 4, 6]], before[[1, 3, 4, 6]])
    assert parked_p[1:].tolist() == [7.0, float(P[1]), 7.0, 7.0, float(P[4]), 7.0]
    assert torch.equal(report.nan_to_num(7.0), P.nan_to_num(7.0))


def test_rows_enter_with_bytes_that_are_given_or_drawn_or_not_at_all(noise):
    embeddings, ran = noise(256, 8), torch.full((5,), 9.0)
    rows, data = torch.tensor([3, 1, 4, 2, 0]), torch.tensor([65, UNREAD, UNREAD, 0, 0])
    next_bytes = torch.tensor([8, 200, 30, 9, NO_BYTE, 77])
    live, h = enter_step(rows, data, next_bytes, embeddings, ran)
    assert live.tolist() == [3, 1, 0, 2, 0]
    assert torch.equal(h[[0, 1, 3]], embeddings[[65, 200, 0]])
    assert ran.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert next_bytes[1:].tolist() == [NO_BYTE, NO_BYTE, NO_BYTE, NO_BYTE, 77]


@DTYPES
@pytest.mark.parametrize("pad_width", [0, 3])
def test_rows_that_waited_resume_and_surface(noise, dtype, pad_width):
    rows, ran = torch.tensor([3, 1, 0]), torch.full((3,), 9.0)
    parked, parked_p = noise(5, 8).to(dtype), noise(5, seed=1)
    pad = noise(pad_width, seed=2).to(dtype) if pad_width else None
    h = resume_step(rows, parked, pad, ran)
    assert torch.equal(h[:, :8], parked[rows])
    assert pad is None or torch.equal(h[:, 8:], pad.expand(3, -1))
    assert ran.tolist() == [1.0, 1.0, 0.0]
    wide, p, opened, chunk = surface_step(rows, parked, parked_p)
    assert torch.equal(wide, parked[rows].float())
    assert torch.equal(p, parked_p[rows])
    assert opened.tolist() == [True, True, False]
    assert chunk.tolist() == [0, 1, 2]


class Draw:
    """Five rows of which each would draw another byte greedily: the one that is ten times its number."""

    def __init__(self) -> None:
        self.rows = torch.tensor([1, 2, 3, 4, 5])
        self.projected = torch.zeros(5, 256)
        self.projected[torch.arange(5), 10 * self.rows] = 9.0
        self.numbers = torch.zeros(len(NUMBERS), 5, dtype=torch.float64)  # greedy, state 0 and its first mask
        self.given = torch.zeros(5, 2, 256, dtype=torch.bool)
        self.given[:, 0] = True
        self.masks = torch.ones(9 * MASKS, 256, dtype=torch.bool)
        self.following = torch.zeros(9 * 256, dtype=torch.int64)
        self.states, self.next_bytes = torch.zeros(6, dtype=torch.int64), torch.full((6,), 300)
        self.logits, self.drawn = torch.zeros(5, 256), torch.zeros(5)

    def tell(self, name: str, index: int, value: float) -> None:
        self.numbers[NUMBERS.index(name), index] = value

    def run(self, places: Tensor | None = None) -> list[float]:
        written = self.states, self.next_bytes, self.logits, self.drawn
        rules = self.numbers, self.given, self.masks, self.following
        draw_step(self.projected, self.rows, places, *rules, *written)
        return self.drawn.tolist()


def test_a_draw_is_kept_for_the_next_step_but_where_it_pauses_or_is_none():
    draw = Draw()
    draw.given[1, 1, 20] = True
    draw.projected[3, 7] = NAN
    assert draw.run() == [10.0, 20.0, 30.0, NOT_FINITE, 50.0]
    assert draw.next_bytes.tolist() == [300, 10, NO_BYTE, 30, NO_BYTE, 50]
    assert torch.equal(draw.logits.nan_to_num(7.0), draw.projected.nan_to_num(7.0))


def test_a_draw_is_of_the_bytes_that_are_given_or_the_automaton_allows_and_leads_on_in_it():
    draw = Draw()
    draw.given[0, 0, 10] = False
    draw.tell("mask", 0, AS_GIVEN)
    draw.tell("state", 1, 3)
    draw.tell("mask", 1, 2)
    draw.masks[3 * MASKS + 2, 20] = False
    draw.tell("state", 2, AS_LEFT)
    draw.states[3] = 4
    draw.masks[4 * MASKS, :100] = False
    draw.following[3 * 256] = 5  # of byte 0, which is what is left to row 2 in state 3
    draw.following[4 * 256 + 100] = 6
    assert draw.run() == [0.0, 0.0, 100.0, 40.0, 50.0]
    assert draw.states.tolist() == [0, 0, 5, 6, 0, 0]


def test_a_draw_of_some_of_a_batch_goes_by_their_own_numbers():
    draw = Draw()
    draw.tell("mask", 4, AS_GIVEN)
    draw.given[4, 0, :100] = False
    draw.given[4, 1, 100] = True
    assert draw.run(torch.tensor([4, 0, 0, 0, 0])) == [100.0, 20.0, 30.0, 40.0, 50.0]
    assert draw.next_bytes.tolist() == [300, NO_BYTE, 20, 30, 40, 50]
