"""The static step is the step: the same numbers, verdicts and memory as `HNet.step`, whoever waits and however long."""

from __future__ import annotations

import pytest

from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.override import RouterOverride
from tests.gpu.emulator import EmulatedGraphs
from tests.gpu.steps import captured, step_together

CHOICES = {
    "everybody waits": lambda rng: True,
    "nobody waits": lambda rng: False,
    "now and then": lambda rng: rng.random() < 0.5,
}
GOLDEN = ("a_1stage", "b_2stage", "e_iso_T2", "g_2stage_bf16")


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", GOLDEN)
def test_it_is_the_step_on_the_golden_models(golden_case, name, choice):
    case = golden_case(name)
    step_together(captured(case.config, case.weights), HNet(case.config, case.weights), 1, CHOICES[choice])


def test_it_is_the_step_in_every_layout(generated):
    model = captured(generated.config, generated.weights)
    step_together(model, HNet(generated.config, generated.weights), 2, CHOICES["now and then"])


@pytest.mark.parametrize("name", GOLDEN)
def test_replayed_it_is_the_step(golden_case, name):
    case = golden_case(name)
    model = captured(case.config, case.weights, EmulatedGraphs(spoils=True), most_graphs=10)
    step_together(model, HNet(case.config, case.weights), 3, CHOICES["now and then"])


def test_replayed_it_is_the_step_in_every_layout(generated):
    model = captured(generated.config, generated.weights, EmulatedGraphs(), most_graphs=1)
    step_together(model, HNet(generated.config, generated.weights), 4, CHOICES["now and then"], rows=3)


def test_boundaries_by_chance_are_the_same_ones(golden_case):
    case = golden_case("b_2stage")
    override = RouterOverride((2.5, 1.7), seed=3)
    model = captured(case.config, case.weights, EmulatedGraphs(), override=override, most_graphs=1)
    step_together(model, HNet(case.config, case.weights, override), 5, CHOICES["now and then"])
