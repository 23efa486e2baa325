"""The whole engine on captured steps, replayed by the emulator: whatever the policy, company and memory, each request
gets what it gets on the eager model, to the bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.config import ModelConfig
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.state.arenas import kv_bytes_per_position
from hnet_runtime.state.rows import PAGE
from tests import courses
from tests.engine.conftest import Driver
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.steps import captured

_TRUTHS: dict[tuple[str, bool], courses.Truth] = {}
GREEDY = {"temperature": 0.0, "ignore_eos": True, "utf8": "raw"}


@cache
def demo() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    source = locate("demo")
    return source.config, load_weights(source, dtype=torch.float32)


@pytest.fixture
def play(golden_case, keep_threads):
    """`play(name, chunky, events, settings)`: a course on captured steps, each request compared with the eager engine;
    the driver."""

    def run(name: str, chunky: bool, events: list[Any], settings: Any) -> Any:
        config, weights = demo() if name == "demo" else (golden_case(name).config, golden_case(name).weights)
        override = courses.CHUNKY if chunky else None
        if (name, chunky) not in _TRUTHS:
            eager = HNet(config, weights, override)
            _TRUTHS[name, chunky] = courses.Truth(lambda config: Driver(Engine(eager, config=config)))
        truth = _TRUTHS[name, chunky]
        model = captured(config, weights, EmulatedGraphs(spoils=True), override=override, most_graphs=10)
        page = PAGE * kv_bytes_per_position(config, model.dtype, courses.MAX_MODEL_LEN)
        settings = settings(page) if callable(settings) else settings
        return courses.run(lambda config: Driver(Engine(model, config=config)), truth, events, settings)

    return run


@pytest.mark.parametrize(
    ("name", "batching"),
    [
        ("b_2stage", "lockstep"),
        ("b_2stage", "aligned"),
        ("b_2stage", "adaptive"),
        ("a_1stage", "aligned"),
        ("e_iso_T2", "lockstep"),
        ("demo", "adaptive"),
        ("demo", "aligned"),
    ],
)
def test_all_kinds_of_requests_together(play, name, batching):
    events: list[Any] = [("submit", prompt % len(courses.PROMPTS), prompt, "") for prompt in range(len(courses.KINDS))]
    events[5:5] = [("tick", 9, 0, "")]
    driver = play(name, False, events, {"batching": batching, "max_num_seqs": 5, "max_park_ticks": 5})
    parked = sum(len(tick.stats.park_waits) for tick in driver.ticks)
    assert bool(parked) == (batching == "aligned") or batching == "adaptive"


def test_preempted_rows_go_on_as_they_were(play):
    driver = play("b_2stage", True, courses.TIGHT, courses.tight_settings)
    assert driver.ticks[-1].stats.preemptions_total > 0


def test_rows_that_begin_from_a_snapshot_or_share_one(play):
    driver = play("a_1stage", False, courses.SHARING, courses.ROOMY)
    assert driver.ticks[-1].stats.prefix_cache_hits_bytes_total > 0


def test_the_recorded_bytes_in_bfloat16_are_those_of_the_eager_engine(golden_case, keep_threads):
    case = golden_case("g_2stage_bf16")
    heard = []
    for model in (
        HNet(case.config, case.weights),
        captured(case.config, case.weights, EmulatedGraphs(), most_graphs=5),
    ):
        driver = Driver(Engine(model, config=EngineConfig(max_num_seqs=4, max_model_len=512, threads=1)))
        for prompt in case.prompts():
            driver.submit(str(prompt.index), bytes(prompt.ids.tolist()), max_tokens=40, logprobs=2, **GREEDY)
        heard.append({request_id: gathered.substance for request_id, gathered in driver.run().items()})
    assert heard[0] == heard[1]
