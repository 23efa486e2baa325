"""Each way in which a step that is launched ahead could go wrong is noticed by courses that are right without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hnet_runtime.config import EOS
from hnet_runtime.engine import flight
from hnet_runtime.engine.flight import Flight
from hnet_runtime.engine.loop import EngineLoop
from hnet_runtime.engine.sampler import CapturedSampler
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.step_buffers import Report, StepBuffers
from hnet_runtime.ops import entry
from tests.conftest import load_golden
from tests.engine.conftest import Gathered
from tests.gpu.overlapping import assert_same, play


def without_mask(rows, data, next_bytes, embeddings, ran):
    """Whoever is given runs."""
    byte = torch.where(data == -1, next_bytes.index_select(0, rows), data)
    ran.copy_(rows > 0)
    return rows, embeddings.index_select(0, byte.clamp(min=0))


def one_set_of_host_memory(self, rows, data, bucket, unread=None):
    self._turn = 0  # it is turned to 1 for every step
    BRING(self, rows, data, bucket, unread)


def logits_in_place(self, bucket):
    report = ASK(self, bucket)
    return Report(report.numbers, self.logits[:bucket], report.arrived)


def ends_at_no_eos(request, follows=False):
    row = ROW_SAMPLING(request, follows)
    return replace(row, pauses=row.pauses & (np.arange(256) != EOS))


def ends_at_no_stop_string(request, follows=False):
    row = ROW_SAMPLING(request, follows)
    return replace(row, pauses=row.pauses & (np.arange(256) == EOS))


def the_same_number_again(request, follows=False):
    return replace(ROW_SAMPLING(request), follows=follows)


def for_one_byte_more(request, follows=False):
    """The mask of a byte that it has one more behind than it has."""
    return replace(ROW_SAMPLING(request, follows), mask_row=request.mask_row)


def a_character_of_its_own(self, rows):
    """Each byte's mask as if it began a character."""
    EXPECT(self, [row and replace(row, follows=False) for row in rows])


def everybody_rides(self):
    """Those who are over or pause are taken for riders."""
    self.riders = set(self.requests)


def freed_at_once(self, request_id):
    """An abort that does not wait for the step under way."""
    request = self._scheduler.cancel(request_id)
    if request is not None:
        request.finish("abort")
        self._over.append(request)
        self._admit(0.0)


BRING, ASK, EXPECT = StepBuffers.bring, StepBuffers.ask, CapturedSampler.expect
ROW_SAMPLING = flight.row_sampling
PLANTED = [
    (entry, "enter_step", without_mask),
    (StepBuffers, "bring", one_set_of_host_memory),
    (StepBuffers, "ask", logits_in_place),
    (flight, "row_sampling", ends_at_no_eos),
    (flight, "row_sampling", ends_at_no_stop_string),
    (flight, "row_sampling", the_same_number_again),
    (flight, "row_sampling", for_one_byte_more),
    (CapturedSampler, "expect", a_character_of_its_own),
    (Flight, "board", everybody_rides),
    (EngineLoop, "abort", freed_at_once),
]


@pytest.fixture(scope="module")
def truths() -> list[dict[str, Gathered]]:
    """Of three courses, on the eager engine."""
    case, threads = load_golden("e_iso_T2"), torch.get_num_threads()
    found = [play(HNet(case.config, case.weights), seed).gathered for seed in range(3)]
    torch.set_num_threads(threads)
    return found


def compare(model_of, truths) -> None:
    for seed, truth in enumerate(truths):
        assert_same(play(model_of("e_iso_T2"), seed, overlap=True), truth)


def test_without_a_defect_the_courses_are_right(model_of, truths):
    compare(model_of, truths)


@pytest.mark.parametrize(("home", "name", "defect"), PLANTED, ids=lambda each: getattr(each, "__name__", each))
def test_a_defect_is_caught(model_of, truths, monkeypatch, home, name, defect):
    """A request gets what it does not get without, or the engine itself finds that host and device disagree."""
    monkeypatch.setattr(home, name, defect)
    with pytest.raises((AssertionError, KeyError)):
        compare(model_of, truths)
