"""Steps that are launched before the one before is read: what a row gets is what it gets without, and each way in which
that could go wrong is noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hnet_runtime.config import EOS
from hnet_runtime.engine import loop, utf8
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.loop import EngineLoop
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import CapturedSampler, RowSampling, Sampler
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.step_buffers import Report, StepBuffers
from hnet_runtime.model.step_draws import StepDraws
from tests.engine.conftest import Driver
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.steps import assert_memory_is_the_same, captured, new_rows

CPU = torch.device("cpu")
MANNERS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "utf8": "raw", "logprobs": 2},
    {"temperature": 1.2, "max_tokens": 40, "seed": 3, "return_chunks": True},
    {"temperature": 2.0, "max_tokens": 40, "seed": 4, "stop": (b"e", b"ab", b" t"), "ignore_eos": True},
    {"temperature": 2.0, "max_tokens": 40, "seed": 5, "stop": (b"a",), "include_stop_str_in_output": True},
    {"temperature": 1.0, "max_tokens": 40, "seed": 6, "utf8": "raw", "top_p": 0.95, "stop_token_ids": (101, 200)},
    {"temperature": 3.0, "max_tokens": 25, "seed": 7, "min_p": 0.001, "ignore_eos": True, "logprobs": 0},
    {"temperature": 2.5, "max_tokens": 50, "seed": 14, "utf8": "raw"},
]


def play(model: CapturedHNet, seed: int, *, overlap: bool, batching: str = "lockstep", num_events: int = 14) -> Driver:
    """Requests of all manners come, go and are aborted in a course of chance, memory checked after each tick."""
    rng = random.Random(seed)
    config = EngineConfig(
        max_num_seqs=4, max_model_len=128, threads=1, batching=batching, overlap=overlap, debug_checks=True
    )
    driver = Driver(Engine(model, config=config))
    for number in range(num_events):
        manner = dict(rng.choice(MANNERS))
        driver.submit(str(number), b"\xfeOnce upon a time"[: rng.randrange(1, 17)], **manner)
        for _ in range(rng.choice([0, 0, 1, 4, 12, 30])):
            driver.tick()
        if rng.random() < 0.25:
            driver.engine.abort(str(rng.randrange(number + 1)))
    driver.run()
    return driver


def substance(driver: Driver) -> dict[str, Any]:
    """What each request got; of one that was aborted, when it was is a matter of time."""
    return {name: each.substance for name, each in driver.gathered.items() if each.finish_reason != "abort"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step went on with unread bytes of."""
    heard: list[int] = []
    launch = CapturedHNet.launch

    def listening(self: Any, *args: Any, unread: Any = None, **more: Any) -> Any:
        heard.append(sum(unread or ()))
        return launch(self, *args, unread=unread, **more)

    monkeypatch.setattr(CapturedHNet, "launch", listening)
    return heard


@pytest.fixture
def model_of(golden_case, keep_threads) -> Callable[[str], CapturedHNet]:
    def build(name: str) -> CapturedHNet:
        case = golden_case(name)
        return captured(case.config, case.weights, EmulatedGraphs(spoils=True), most_graphs=5)

    return build


@pytest.mark.parametrize(
    ("name", "batching"), [("b_2stage", "lockstep"), ("b_2stage", "adaptive"), ("a_1stage", "aligned")]
)
@pytest.mark.parametrize("seed", range(2))
def test_requests_get_what_they_get_without(model_of, launched, name, batching, seed):
    model = model_of(name)
    without = substance(play(model, seed, overlap=False, batching=batching))
    assert not any(launched)
    found = substance(play(model, seed, overlap=True, batching=batching))
    assert sum(launched) > (0 if batching == "aligned" else 20)  # there a row that is alone goes through
    both = found.keys() & without.keys()
    assert len(both) > len(without) // 2
    assert {name: found[name] for name in both} == {name: without[name] for name in both}


def test_an_abort_takes_the_byte_on_its_way_with_it(model_of):
    """Tick for tick a request has as much as it has without, and its row is another's only after the step landed."""
    heard = []
    for overlap in (False, True):
        config = EngineConfig(max_num_seqs=2, max_model_len=128, threads=1, overlap=overlap, debug_checks=True)
        driver = Driver(Engine(model_of("b_2stage"), config=config))
        for number in range(2):
            driver.submit(str(number), b"\xfeOnce", **MANNERS[0])
        for _ in range(9):
            driver.tick()
        driver.engine.abort("0")
        driver.submit("2", b"\xfeOnce", **MANNERS[0])
        driver.run()
        heard.append({name: each.substance for name, each in driver.gathered.items()})
    assert heard[0] == heard[1]
    assert heard[1]["0"][4] == "abort"


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
        for flight, by in zip(flights, drawn_by, strict=True):
            found = flight.land()
            assert flight.ran is not None
            assert [row for row, ran in zip(rows, flight.ran, strict=True) if ran] == list(going)
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


# ── what could go wrong ───────────────────────────────────────────────────────────────────────


def without_mask(self, rows, data):
    """Whoever is given runs."""
    byte = torch.where(data == -1, self.next_bytes.index_select(0, rows), data)
    return rows, byte.clamp(min=0)


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


def a_character_of_its_own(self, rows):
    """Each byte's mask as if it began a character."""
    EXPECT(self, [row and replace(row, follows=False) for row in rows])


def freed_at_once(self, request_id):
    """An abort that does not wait for the step under way."""
    request = self._scheduler.cancel(request_id)
    if request is not None:
        request.finish("abort")
        self._over.append(request)
        self._admit(0.0)


BRING, ASK, EXPECT = StepBuffers.bring, StepBuffers.ask, CapturedSampler.expect
ROW_SAMPLING = loop._row_sampling
PLANTED = [
    (StepDraws, "enter", without_mask),
    (StepBuffers, "bring", one_set_of_host_memory),
    (StepBuffers, "ask", logits_in_place),
    (loop, "_row_sampling", ends_at_no_eos),
    (loop, "_row_sampling", ends_at_no_stop_string),
    (loop, "_row_sampling", the_same_number_again),
    (CapturedSampler, "expect", a_character_of_its_own),
    (EngineLoop, "abort", freed_at_once),
]


@pytest.mark.parametrize(("home", "name", "defect"), PLANTED, ids=lambda each: getattr(each, "__name__", each))
def test_a_defect_is_caught(model_of, monkeypatch, home, name, defect):
    """A request gets what it does not get without, or the engine itself finds that host and device disagree."""
    model = model_of("e_iso_T2")
    truths = [substance(play(model, seed, overlap=False)) for seed in range(3)]
    monkeypatch.setattr(home, name, defect)

    def compare() -> None:
        for seed, truth in enumerate(truths):
            found = substance(play(model_of("e_iso_T2"), seed, overlap=True))
            both = found.keys() & truth.keys()
            assert {name: found[name] for name in both} == {name: truth[name] for name in both}

    with pytest.raises((AssertionError, KeyError)):
        compare()
