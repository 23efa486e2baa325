"""Every policy, batch, order of arrival, span, preemption, prefix hit and fork gives each request the very same: native
kernels, in each dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.state.arenas import kv_bytes_per_position
from hnet_runtime.state.rows import PAGE
from tests import courses

_TRUTHS: dict[tuple[Any, ...], courses.Truth] = {}


@pytest.fixture
def course_on(case_named, native_of, driver_class, keep_threads, library) -> Callable[..., Any]:
    """`course_on(name, chunky, numbers)`: strategy of settings, tight ones, and a function that plays a course."""

    def build(name: str, chunky: bool, numbers: str) -> tuple[Any, dict[str, Any], Callable[..., Any]]:
        config, weights = case_named(name)
        model = native_of(config, weights, numbers, override=courses.CHUNKY if chunky else None)

        def driver_of(engine_config: EngineConfig) -> Any:
            return driver_class(Engine(model, config=engine_config))

        truth = _TRUTHS.setdefault((library.isa, name, chunky, numbers), courses.Truth(driver_of))
        page = PAGE * kv_bytes_per_position(config, model.dtype, courses.MAX_MODEL_LEN)
        play = lambda events, config: courses.run(driver_of, truth, events, config)  # noqa: E731
        return courses.settings_for(page), courses.tight_settings(page), play

    return build


def examples(count: int, isa: str) -> Callable[..., Any]:
    """A quarter of them on the portable library, which is slow and shares the bookkeeping with all others."""
    return settings(
        max_examples=count // 4 if isa == "portable" else count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.mark.parametrize(
    ("name", "chunky"),
    [("a_1stage", False), ("a_1stage", True), ("b_2stage", False), ("b_2stage", True), ("e_iso_T2", False)],
)
def test_no_course_of_events_changes_what_a_request_gets(course_on, library, name, chunky):
    strategy, tight, play = course_on(name, chunky, "float32")
    seen: dict[str, int] = {"preemptions": 0, "hits": 0, "parked": 0}

    @examples(60, library.isa)
    @example(events=courses.TIGHT, config=tight)
    @example(events=courses.SHARING, config=courses.ROOMY)
    @given(events=courses.EVENTS, config=strategy)
    def check(events: list[Any], config: dict[str, Any]) -> None:
        driver = play(events, config)
        if driver.ticks:
            stats = driver.ticks[-1].stats
            seen["preemptions"] += stats.preemptions_total
            seen["hits"] += stats.prefix_cache_hits_bytes_total
            seen["parked"] += sum(len(tick.stats.park_waits) for tick in driver.ticks)

    check()
    # Otherwise the courses would prove little.
    assert seen["hits"] > 0
    assert name == "e_iso_T2" or seen["parked"] > 0
    assert not chunky or seen["preemptions"] > 0


@pytest.mark.parametrize("numbers", ["bfloat16", "int8"])
@pytest.mark.parametrize("chunky", [False, True])
def test_nor_in_other_numbers(course_on, library, numbers, chunky):
    strategy, tight, play = course_on("b_2stage", chunky, numbers)

    @examples(25, library.isa)
    @example(events=courses.TIGHT, config=tight)
    @example(events=courses.SHARING, config=courses.ROOMY)
    @given(events=courses.EVENTS, config=strategy)
    def check(events: list[Any], config: dict[str, Any]) -> None:
        play(events, config)

    check()
