"""Which steps are captured, in what order, and how their replays are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pytest
from torch import Tensor

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.graphs import Eager, StepGraphs, buckets
from hnet_runtime.model.captured import StepKey, step_kinds
from server.admission import Backlog
from server.metrics import Metrics
from tests.engine.conftest import Driver
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.steps import captured


class Recorder:
    """Captures nothing, and remembers what it was asked to."""

    mode: Literal["graph", "eager"] = "graph"
    num_bytes = 5

    def __init__(self) -> None:
        self.captured = 0

    def capture(
        self, run: Callable[[], None], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> Callable[[], None]:
        run()
        return run


@pytest.mark.parametrize("most", [1, 2, 7, 16, 64, 100, 256])
def test_buckets_hold_every_number_of_rows(most):
    sizes = buckets(most, 1000)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        held = next(size for size in sizes if size >= rows)
        assert held < 2 * rows
    assert most < 256 or sizes == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


@pytest.mark.parametrize("budget", range(14))
def test_a_budget_thins_buckets_out_and_leaves_the_largest(budget):
    sizes = buckets(256, budget)
    assert len(sizes) == max(budget, 1)
    assert sizes[-1] == 256
    assert set(sizes) <= set(buckets(256, 1000))


def test_the_last_stage_has_nobody_who_waits():
    assert step_kinds(1) == [(0, False)]
    assert step_kinds(3) == [(0, False), (0, True), (1, False), (1, True), (2, False)]


def test_steps_of_most_rows_are_captured_first():
    order: list[int] = []
    keys = [StepKey(bucket, 0, parks) for bucket in (1, 8, 2) for parks in (False, True)]
    graphs = StepGraphs(Recorder())
    graphs.prepare({key: lambda key=key: order.append(key.bucket) for key in keys}, [], [])
    assert order == [8, 8, 2, 2, 1, 1]
    assert (graphs.num_graphs, graphs.num_bytes) == (6, 5)
    assert graphs.seconds > 0


def test_a_step_that_is_not_captured_is_run_and_told_so():
    ran: list[str] = []
    graphs = StepGraphs(Eager())
    graphs.prepare({StepKey(4, 1, True): lambda: ran.append("it")}, [], [])
    assert (ran, graphs.num_graphs) == ([], 0)
    graphs.run(StepKey(4, 1, True))
    assert ran == ["it"]
    assert [(each.kind, each.bucket, each.mode, each.count) for each in graphs.take()] == [("stage", 4, "eager", 1)]
    assert graphs.take() == ()


def test_replays_travel_from_the_engine_to_the_metrics(golden_case, keep_threads):
    case = golden_case("e_iso_T2")
    model = captured(case.config, case.weights, EmulatedGraphs())
    engine = Engine(model, config=EngineConfig(max_num_seqs=3, max_model_len=64, threads=1))
    assert (engine.info.num_graphs, engine.info.kernels) == (3, "torch")
    assert engine.info.capture_seconds > 0
    driver = Driver(engine)
    for request in range(3):
        driver.submit(str(request), b"\xfeabc", max_tokens=5, temperature=0.0, ignore_eos=True)
    metrics = Metrics(Backlog())
    while engine.has_work:
        metrics.tick(driver.tick(), 0.0)
    assert metrics.graph_replays == {("byte", 3, "graph"): 4}


def test_overlapped_ticks_travel_from_the_engine_to_the_metrics(model_of):
    config = EngineConfig(max_num_seqs=3, max_model_len=64, threads=1, overlap=True)
    driver = Driver(Engine(model_of("e_iso_T2"), config=config))
    driver.submit("0", b"\xfeabc", max_tokens=5, temperature=0.0, ignore_eos=True)
    metrics = Metrics(Backlog())
    while driver.engine.has_work:
        metrics.tick(driver.tick(), 0.0)
    assert metrics.totals.overlapped_ticks_total == 3  # four bytes are fed, of which a plan has the first
