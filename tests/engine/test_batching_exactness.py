"""Every policy, batch, order of arrival, span, preemption, prefix hit and fork gives each request the very same: the
torch path in fp32. (`tests/native` has many more courses, on kernels that are faster.)"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.state.arenas import kv_bytes_per_position
from hnet_runtime.state.rows import PAGE
from tests import courses


@pytest.mark.parametrize(("name", "chunky"), [("a_1stage", True), ("b_2stage", False), ("b_2stage", True)])
def test_no_course_of_events_changes_what_a_request_gets(golden_case, driver_class, keep_threads, name, chunky):
    case = golden_case(name)
    model = HNet(case.config, case.weights, courses.CHUNKY if chunky else None)

    def driver_of(config: EngineConfig) -> Any:
        return driver_class(Engine(model, config=config))

    truth = courses.Truth(driver_of)
    page = PAGE * kv_bytes_per_position(case.config, model.dtype, courses.MAX_MODEL_LEN)

    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(events=courses.EVENTS, config=courses.settings_for(page))
    def check(events: list[Any], config: dict[str, Any]) -> None:
        courses.run(driver_of, truth, events, config)

    check()
