"""Steps that are launched before the one before is read: each request gets what it gets without, and on the eager
model, to the bit; and when there are such steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hnet_runtime.engine.building import launches_ahead
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.graphs import Eager, StepGraphs
from hnet_runtime.engine.loop import EngineLoop
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.state.arenas import kv_bytes_per_position
from hnet_runtime.state.rows import PAGE
from tests import courses
from tests.engine.conftest import Driver
from tests.gpu.allow_list import VIEWS, name_of
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.overlapping import HOST_DRAWN, MANNERS, assert_same, num_overlapped, play
from tests.gpu.steps import captured


@pytest.mark.parametrize(
    ("name", "batching", "seed"),
    [
        ("b_2stage", "lockstep", 0),
        pytest.param("b_2stage", "lockstep", 1, marks=pytest.mark.slow),
        ("b_2stage", "adaptive", 0),
        pytest.param("b_2stage", "adaptive", 1, marks=pytest.mark.slow),
        ("b_2stage", "aligned", 2),
        ("a_1stage", "aligned", 0),
        pytest.param("a_1stage", "aligned", 1, marks=pytest.mark.slow),
        ("a_1stage", "lockstep", 3),
        ("e_iso_T2", "lockstep", 4),
        ("e_iso_T2", "adaptive", 5),
        ("e_iso_T2", "aligned", 6),
    ],
)
def test_requests_get_what_they_get_without_and_on_the_eager_engine(model_of, golden_case, name, batching, seed):
    case = golden_case(name)
    eager = play(HNet(case.config, case.weights), seed, batching=batching)
    model = model_of(name)
    without = play(model, seed, overlap=False, batching=batching)
    overlapped = play(model, seed, overlap=True, batching=batching)
    assert (num_overlapped(eager), num_overlapped(without)) == (0, 0)
    # Under `aligned` rows of several stages run through all of them alone, or not at all.
    assert num_overlapped(overlapped) > (20 if batching == "aligned" and name != "e_iso_T2" else 40)
    assert_same(without, eager.gathered)
    assert_same(overlapped, eager.gathered)
    assert_same(overlapped, without.gathered)


@pytest.fixture
def eager_truth(golden_case):
    """`eager_truth(name, chunky)`: what requests of `courses` get in an eager engine of their own; and the model whose
    steps are captured."""

    def build(name: str, *, chunky: bool) -> tuple[courses.Truth, CapturedHNet]:
        case, override = golden_case(name), courses.CHUNKY if chunky else None
        eager = HNet(case.config, case.weights, override)
        graphs = EmulatedGraphs(spoils=True)
        model = captured(case.config, case.weights, graphs, override=override, most_graphs=10)
        return courses.Truth(lambda config: Driver(Engine(eager, config=config))), model

    return build


@pytest.mark.parametrize("name", ["a_1stage", "b_2stage"])
def test_preempted_rows_go_on_as_they_were(eager_truth, keep_threads, name):
    """Nothing is launched ahead where a page may have to be taken from somebody."""
    truth, model = eager_truth(name, chunky=True)
    page = PAGE * kv_bytes_per_position(model.config, model.dtype, courses.MAX_MODEL_LEN)
    settings = {**courses.tight_settings(page), "overlap": True}
    driver = courses.run(lambda config: Driver(Engine(model, config=config)), truth, courses.TIGHT, settings)
    assert driver.ticks[-1].stats.preemptions_total > 0
    assert num_overlapped(driver) > 20


def test_rows_that_begin_from_a_snapshot_or_share_one(eager_truth, keep_threads):
    """A completion that ended in a step behind which another was under way is a prefix like any other."""
    truth, model = eager_truth("a_1stage", chunky=False)
    settings = {**courses.ROOMY, "batching": "lockstep", "overlap": True}
    driver = courses.run(lambda config: Driver(Engine(model, config=config)), truth, courses.SHARING, settings)
    assert driver.ticks[-1].stats.prefix_cache_hits_bytes_total > 0
    assert num_overlapped(driver) > 20


def test_all_kinds_of_requests_together(eager_truth, keep_threads):
    truth, model = eager_truth("e_iso_T2", chunky=False)
    events: list[Any] = [("submit", kind % len(courses.PROMPTS), kind, "") for kind in range(len(courses.KINDS))]
    events[5:5] = [("tick", 9, 0, "")]
    events += [("tick", 500, 0, ""), ("submit", 1, 0, "")]  # behind those that the host draws for
    settings = {"batching": "lockstep", "max_num_seqs": 5, "overlap": True}
    driver = courses.run(lambda config: Driver(Engine(model, config=config)), truth, events, settings)
    assert num_overlapped(driver) > 20


def two_rows(model: CapturedHNet, overlap: bool = True, **settings: Any) -> Driver:
    config = EngineConfig(
        max_num_seqs=2,
        max_model_len=128,
        threads=1,
        batching="lockstep",
        overlap=overlap,
        debug_checks=True,
        **settings,
    )
    return Driver(Engine(model, config=config))


def test_an_abort_takes_the_byte_on_its_way_with_it(model_of):
    """Tick for tick a request has as much as it has without, and its row is another's only after the step landed."""
    heard = []
    for overlap in (False, True):
        driver = two_rows(model_of("b_2stage"), overlap)
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


def test_a_row_is_given_away_when_the_step_under_way_has_landed(model_of):
    """The one request ends while a step is under way that the other rides in; a third waits for its row."""
    driver = two_rows(model_of("e_iso_T2"))
    driver.submit("long", b"\xfeOnce", **MANNERS[0])
    driver.submit("short", b"\xfeOnce", **{**MANNERS[0], "max_tokens": 6})
    driver.submit("next", b"\xfeOnce", **MANNERS[0])
    while driver.gathered["short"].finish_reason is None:
        stats = driver.tick().stats
    before = num_overlapped(driver)
    assert (before, stats.running, stats.waiting) == (4, 1, 1)  # who waits hinders no overlap while no row is free
    stats = driver.tick().stats  # of that step; behind it nothing is launched
    assert (num_overlapped(driver), stats.running, stats.waiting) == (before + 1, 1, 1)
    stats = driver.tick().stats
    assert (num_overlapped(driver), stats.running, stats.waiting) == (before + 1, 2, 0)
    driver.run()
    assert driver.gathered["next"].data == driver.gathered["long"].data


@pytest.mark.parametrize("manner", HOST_DRAWN, ids=["penalties", "filter", "constraint"])
def test_nothing_is_launched_behind_rows_that_the_host_draws_for(model_of, manner):
    driver = two_rows(model_of("e_iso_T2"))
    driver.submit("plain", b"\xfeOnce", **MANNERS[0])
    driver.submit("host", b"\xfeOnce", **manner)
    while driver.gathered["host"].finish_reason is None:
        driver.tick()
        assert num_overlapped(driver) == 0
    driver.run()
    assert num_overlapped(driver) > 10


def test_the_last_byte_is_known_to_be_on_its_way(model_of, monkeypatch):
    """Whoever reaches its last byte in the step under way is not given another one, be it the only row."""
    launches: list[int] = []
    launched = CapturedHNet.launch

    def listening(self: Any, state: Any, rows: Any, *args: Any, **more: Any) -> Any:
        launches.append(len(rows))
        return launched(self, state, rows, *args, **more)

    monkeypatch.setattr(CapturedHNet, "launch", listening)
    driver = two_rows(model_of("e_iso_T2"))
    driver.submit("0", b"\xfeOnce", **{**MANNERS[0], "max_tokens": 4})
    driver.submit("1", b"\xfeOnce", **{**MANNERS[0], "max_tokens": 9})
    driver.run()
    assert launches == [2] * 3 + [1] * 5  # their first bytes are the prompts', their last ones are never run


class Operations(TorchDispatchMode):
    """Counts what is asked of tensors, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[name_of(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_is_read_without_a_wait_for_the_one_behind_it(model_of, monkeypatch):
    """What a step brought is in the host's memory: nothing between its landing and the next tick makes, fetches or
    sends a tensor, which would stand in line behind the step under way."""
    operations, land = Operations(), EngineLoop._land

    def listening(self: Any, *args: Any) -> Any:
        if self._ahead is None:
            return land(self, *args)
        with operations:
            return land(self, *args)

    monkeypatch.setattr(EngineLoop, "_land", listening)
    driver = two_rows(model_of("b_2stage"))
    for number, manner in enumerate((MANNERS[1], MANNERS[2])):
        driver.submit(str(number), b"\xfeOnce", **manner)
    driver.run()
    assert num_overlapped(driver) > 10
    assert operations.names["slice"] > 10
    assert operations.names.keys() <= VIEWS | {"clone"}  # the last logits of one that ends


def test_overlap_is_said_to_be_ignored_where_nothing_is_captured(model_of, golden_case, caplog, keep_threads):
    case = golden_case("e_iso_T2")
    for model in (captured(case.config, case.weights), HNet(case.config, case.weights)):
        caplog.clear()
        driver = two_rows(model)
        assert [record.message.partition(":")[0] for record in caplog.records if record.levelname == "ERROR"] == [
            "overlap is ignored"
        ]
        driver.submit("0", b"\xfeOnce", **MANNERS[0])
        driver.run()
        assert num_overlapped(driver) == 0


def test_it_is_on_where_steps_are_captured_on_a_gpu_alone():
    graphs, eager = StepGraphs(EmulatedGraphs()), StepGraphs(Eager())
    for overlap, device, steps, expected in (
        (None, "cuda", graphs, True),
        (None, "cuda", eager, False),
        (None, "cpu", graphs, False),
        (None, "cpu", None, False),
        (False, "cuda", graphs, False),
        (True, "cpu", graphs, True),
    ):
        assert launches_ahead(EngineConfig(overlap=overlap), steps, torch.device(device)) == expected
