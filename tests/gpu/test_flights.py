"""Two steps in flight on a captured model: what the device knows by itself of the first, the second runs on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hnet_runtime.config import EOS
from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import CapturedSampler, RowSampling, Sampler
from hnet_runtime.model.hierarchy import HNet
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.steps import assert_memory_is_the_same, captured, new_rows

CPU = torch.device("cpu")


def test_the_device_follows_utf8_as_the_host_does(golden_case):
    """The automaton's tables say what the automaton says."""
    following, masks = utf8.state_table(), utf8.mask_table()
    for state in utf8.STATES:
        for byte in range(256):
            after = utf8.advance(state, byte)
            assert following[state, byte] == (utf8.START if after is None else after)
    assert 2 * utf8.LONGEST * (len(following) - 1) == utf8.ANY_BYTE
    assert (following[-1] == len(following) - 1).all()
    assert masks[utf8.ANY_BYTE].all()


class Twins:
    """A model that may have two steps in flight, and one that is read after each, on rows that draw at random."""

    def __init__(self, case: Any) -> None:
        self.model = captured(case.config, case.weights, EmulatedGraphs(spoils=True), most_graphs=5)
        self.twin = HNet(case.config, case.weights)
        self.ours, self.theirs = new_rows(self.model, 5), new_rows(self.twin, 5)
        self.sampler, self.plain = CapturedSampler(CPU, self.model.draws(self.ours)), Sampler(CPU)
        self.rng = np.random.default_rng(1)
        self.pauses = np.zeros(256, dtype=np.bool_)
        self.pauses[[EOS, *range(60, 120, 2)]] = True

    def by(self, state: int, follows: bool = False) -> RowSampling:
        mask_row = utf8.mask_row(state, 4, may_end=True)
        return RowSampling(SamplingParams(temperature=2.0), mask_row, self.rng.random(), None, self.pauses, follows)

    def run_two(self, rows: list[int], parks: bool) -> tuple[list[int], list[int]]:
        """A byte of each row and, launched behind it, one more of those who go on: who rode in that, and who parked."""
        data = bytes(self.rng.integers(97, 122, len(rows)).tolist())
        drawn_by = {row: self.by(utf8.START) for row in rows}, {row: self.by(utf8.START, follows=True) for row in rows}
        flights = []
        for unread, by in zip((False, True), drawn_by, strict=True):
            self.sampler.expect(list(by.values()))
            given = b"\0" * len(rows) if unread else data
            flights.append(self.model.launch(self.ours, rows, given, parks=parks, unread=[unread] * len(rows)))
        states = dict.fromkeys(rows, utf8.START)
        going, parked = dict(zip(rows, data, strict=True)), []
        for launched, by in zip(flights, drawn_by, strict=True):
            found = launched.land()
            assert launched.ran is not None
            assert [row for row, ran in zip(rows, launched.ran, strict=True) if ran] == list(going)
            if not going:
                break
            truth = self.twin.step(self.theirs, list(going), bytes(going.values()), parks=parks)
            assert torch.equal(found.logits, truth.logits)
            assert np.array_equal(found.finished, truth.finished)
            ended = [row for row, done in zip(going, truth.finished, strict=True) if done]
            parked += [row for row in going if row not in ended]
            riders = list(going)
            going = {}
            if ended:
                plainly = [replace(by[row], mask_row=utf8.mask_row(states[row], 4, may_end=True)) for row in ended]
                drawn = self.plain.draw(truth.logits, plainly)
                assert self.sampler.draw(found.logits, [by[row] for row in ended]) == drawn
                going = {row: byte for row, byte in zip(ended, drawn, strict=True) if not self.pauses[byte or 0]}
                states |= {row: utf8.advance(states[row], byte) or utf8.START for row, byte in going.items()}
        else:
            return riders, parked
        return [], parked

    def catch_up(self, rows: list[int]) -> None:
        """Those who parked run on."""
        if rows:
            ours = self.model.step(self.ours, rows, b"", stage=1, parks=False)
            assert torch.equal(ours.logits, self.twin.step(self.theirs, rows, b"", stage=1, parks=False).logits)


@pytest.mark.parametrize(("name", "parks"), [("b_2stage", False), ("b_2stage", True), ("e_iso_T2", False)])
def test_steps_in_flight_are_those_of_a_model_that_is_read_after_each(golden_case, name, parks):
    """Rows that parked, drew an EOS, or a byte at which they pause are left out of the step that was launched
    meanwhile, and nothing of them changes."""
    twins = Twins(golden_case(name))
    rows, rode, waited = [4, 1, 5, 2], 0, 0
    for _ in range(12):
        riders, parked = twins.run_two(rows, parks)
        assert_memory_is_the_same(twins.ours, twins.theirs)
        twins.catch_up(parked)
        rode, waited = rode + len(riders), waited + len(parked)
    assert 0 < rode < 12 * len(rows)
    assert bool(waited) == parks
