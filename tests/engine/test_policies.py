"""What a tick runs: limits that hold for every policy, what is measured, and what it makes adaptive do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.engine.planning import BoundaryRate, CostModel, Planner, nearest_planned
from hnet_runtime.engine.policies import (
    Adaptive,
    Aligned,
    Decision,
    Fire,
    Lane,
    Limits,
    Policy,
    Situation,
    Step,
    Through,
    make_policy,
)

NAMES = ("lockstep", "aligned", "adaptive")
FLAT, LINEAR = (lambda rows: 1.0), (lambda rows: 1.0 * rows)


def situation(runnable: int, *waiting: int, ticks: int = 0, seconds: float = 0.0, prefilling: int = 0) -> Situation:
    """Rows that run, and that wait in each lane, all of them for so long."""
    lanes = [
        Lane(stage, count, ticks if count else 0, seconds if count else 0.0)
        for stage, count in enumerate(waiting, start=1)
    ]
    return Situation(runnable, tuple(lanes), prefilling)


def teach(policy: Policy, stage_costs, rate: float = 0.2, most_rows: int = 16) -> None:
    """Tells a policy costs of every number of rows, and routers that open a chunk at `rate`."""
    for _ in range(4):
        for stage, cost in enumerate(stage_costs):
            for rows in range(1, most_rows + 1):
                policy.observe(stage, rows, cost(rows))
    for stage in range(len(stage_costs) - 1):
        policy.saw(stage, 1000, round(1000 * rate))


def taught(main, rate: float = 0.2, limits: Limits | None = None, before: Situation | None = None) -> Policy:
    """Adaptive that knows a byte step of 0.1 s flat and a main network of that cost, and has made its plans."""
    policy = make_policy("adaptive", 2, limits)
    teach(policy, (lambda rows: 0.1, main), rate)
    for _ in range(40):
        policy.choose(before or situation(8, 0))
    return policy


# ── what holds for every policy ───────────────────────────────────────────────────────────────


def test_unknown_names_and_limits_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match="lockstep, aligned or adaptive, not 'eager'"):
        make_policy("eager", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2: one lane fires a tick"):
        make_policy("lockstep", 3, Limits(max_wait_ticks=1))
    for ticks, seconds in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="allows none"):
            Limits(ticks, seconds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("main", [FLAT, LINEAR])
def test_what_is_foreseen_comes_and_to_ask_changes_nothing(name, main):
    """Of two that are told the same one is asked as well."""
    asked, other = make_policy(name, 2), make_policy(name, 2)
    for policy in (asked, other):
        teach(policy, (lambda rows: 0.1, main), most_rows=64)
    rng = np.random.default_rng(1)
    foreseen, through = 0, 0
    for _ in range(3000):
        tick = situation(int(rng.choice([1, 8, 8, 8, 12, 40])), 0)
        foresees = [asked.goes_through(tick) for _ in range(3)]
        decision = asked.choose(tick)
        assert decision == other.choose(tick)
        assert decision == Through() or not any(foresees)
        foreseen, through = foreseen + any(foresees), through + (decision == Through())
    assert through > 400  # a lone row always goes through
    assert foreseen >= 0.8 * through
    assert make_policy(name, 1).goes_through(situation(8))


@st.composite
def situations(draw, num_lanes: int) -> Situation:
    lanes = []
    for stage in range(1, num_lanes + 1):
        waiting = draw(st.integers(0, 20))
        ages = (draw(st.integers(0, 12)), draw(st.floats(0, 3))) if waiting else (0, 0.0)
        lanes.append(Lane(stage, waiting, *ages))
    least = 0 if any(lane.waiting for lane in lanes) else 1
    return Situation(draw(st.integers(least, 70)), tuple(lanes), draw(st.integers(0, 30)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_situation_moves_on_and_an_overdue_lane_fires_next(data):
    num_lanes = data.draw(st.integers(0, 3))
    policy = make_policy(data.draw(st.sampled_from(NAMES)), num_lanes + 1, Limits(8, 2.0))
    if data.draw(st.booleans()):
        costs = [data.draw(st.sampled_from((FLAT, LINEAR, lambda rows: 0.01))) for _ in range(num_lanes + 1)]
        teach(policy, costs, data.draw(st.floats(0, 1)))
    for seen in data.draw(st.lists(situations(num_lanes), min_size=1, max_size=5)):
        for _ in range(data.draw(st.sampled_from((1, 40, 70)))):
            decision = policy.choose(seen)
            assert_runs_somebody(decision, seen)
            overdue = [lane for lane in seen.lanes if lane.oldest_ticks >= 8 or lane.oldest_seconds >= 2]
            if overdue:
                assert isinstance(decision, Fire)
            if len(overdue) == 1 and seen.live > 1 and sum(lane.waiting > 0 for lane in seen.lanes) == 1:
                assert decision == Fire(overdue[0].stage)


def assert_runs_somebody(decision: Decision, seen: Situation) -> None:
    if isinstance(decision, Fire):
        assert seen.lanes[decision.stage - 1].waiting
    else:
        assert seen.runnable


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("main", [FLAT, LINEAR])
def test_a_lone_row_goes_through_at_once(name, main):
    policy = make_policy(name, 3)
    teach(policy, (lambda rows: 0.1, main, main))
    for _ in range(600):  # long enough for adaptive to try things, if it would
        assert policy.choose(situation(1, 0, 0, prefilling=3)) == Through()
    assert policy.choose(situation(0, 1, 0)) == Fire(1, through=True)
    assert policy.choose(situation(0, 0, 1)) == Fire(2, through=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_chunks_never_parks(name):
    policy = make_policy(name, 1)
    teach(policy, (LINEAR,))
    assert {policy.choose(situation(8)) for _ in range(600)} == {Through()}


@pytest.mark.parametrize("name", NAMES)
def test_the_lane_that_is_more_overdue_goes_first_and_early_enough_for_both(name):
    policy = make_policy(name, 3, Limits(max_wait_ticks=10, max_wait_seconds=5.0))
    young, old = Lane(1, 1, 3, 0.3), Lane(1, 1, 9, 0.3)
    assert policy.choose(Situation(9, (old, Lane(2, 1, 10, 0.1)))) == Fire(2)
    assert policy.choose(Situation(9, (old, Lane(2, 1, 8, 0.1)))) == Fire(1)
    assert policy.choose(Situation(9, (young, Lane(2, 1, 4, 5.0)))) == Fire(2)


# ── lock-step and aligned ─────────────────────────────────────────────────────────────────────


def test_lockstep_lets_what_waits_catch_up_and_then_nobody_parks():
    policy = make_policy("lockstep", 3)
    assert policy.choose(situation(4, 2, 1)) == Fire(1)  # what it parks joins those at stage 2
    assert policy.choose(situation(4, 0, 3)) == Fire(2, through=True)
    assert policy.choose(situation(4, 2, 0)) == Fire(1, through=True)
    assert policy.choose(situation(7, 0, 0)) == Through()


def test_aligned_fires_when_its_share_waits_or_nobody_can_run():
    policy = Aligned(Limits(), share=0.5)
    assert policy.choose(situation(5, 3, 0)) == Step()
    assert policy.choose(situation(4, 4, 0)) == Fire(1)
    assert policy.choose(situation(4, 3, 1)) == Step()
    assert policy.choose(situation(0, 2, 3)) == Fire(2)
    assert make_policy("aligned", 2).choose(situation(2, 5)) == Step()
    assert make_policy("aligned", 2).choose(situation(2, 6)) == Fire(1)


# ── adaptive ──────────────────────────────────────────────────────────────────────────────────


def test_adaptive_goes_through_until_enough_is_measured():
    policy = make_policy("adaptive", 2)
    assert {policy.choose(situation(8, 0)) for _ in range(100)} == {Through()}
    assert policy.choose(situation(6, 2)) == Fire(1, through=True)


def test_adaptive_parks_where_the_main_network_costs_the_same_for_many_rows():
    policy = taught(FLAT)
    assert policy.choose(situation(8, 0)) == Step()
    assert policy.choose(situation(7, 1)) == Step()
    assert policy.choose(situation(1, 7)) == Fire(1)
    assert policy.choose(situation(0, 8)) == Fire(1)


def test_adaptive_goes_through_where_parking_gains_nothing():
    assert taught(LINEAR).choose(situation(8, 0)) == Through()  # every row costs the same, alone or with others
    assert taught(lambda rows: 0.001).choose(situation(8, 0)) == Through()  # the main network is nothing
    assert taught(FLAT, rate=1.0).choose(situation(8, 0)) == Through()  # all rows are due at once anyway


def test_adaptive_goes_through_where_more_ticks_cost_more_than_parking_gains():
    """A tick is also planned, sampled and told of: where that is dear, one that does all is cheaper than two."""
    for outside, decision in ((0.0, Step()), (3.0, Through())):
        policy = make_policy("adaptive", 2)
        teach(policy, (lambda rows: 0.1, FLAT))
        for rows in [*range(1, 17)] * 2:
            policy.observe_outside(rows, outside)
        for _ in range(40):
            policy.choose(situation(8, 0))
        assert policy.choose(situation(8, 0)) == decision


def test_adaptive_changes_its_mind_when_costs_do():
    policy = taught(FLAT)
    assert policy.choose(situation(8, 0)) == Step()
    for _ in range(40):
        for rows in range(1, 17):
            policy.observe(1, rows, LINEAR(rows))
    assert Through() in {policy.choose(situation(8, 0)) for _ in range(40)}


def test_adaptive_tries_the_other_way_now_and_then_and_comes_back():
    policy = taught(FLAT)
    chosen = [policy.choose(situation(8, 0)) for _ in range(8000)]
    tried = chosen.count(Through())
    assert 8 <= tried <= 40
    assert chosen.count(Step()) == 8000 - tried


def test_adaptive_learns_now_and_then_what_many_rows_cost():
    """It fires nobody before all wait, for a few ticks."""
    policy = taught(FLAT)
    first = next(waiting for waiting in range(1, 9) if policy.choose(situation(8 - waiting, waiting)) == Fire(1))
    assert first < 8
    chosen = [policy.choose(situation(8 - first, first)) for _ in range(8000)]
    assert 8 <= chosen.count(Step()) <= 40


def test_rows_about_to_join_are_waited_for_a_little_but_not_beyond_the_limits():
    policy = taught(FLAT)
    first = next(waiting for waiting in range(1, 9) if policy.choose(situation(8 - waiting, waiting)) == Fire(1))
    assert policy.choose(situation(8 - first, first, prefilling=6)) == Step()
    assert policy.choose(situation(8 - first, first, ticks=64, prefilling=6)) == Fire(1)
    assert policy.choose(situation(0, 8, prefilling=6)) == Fire(1)


def test_the_deepest_lane_gathers_from_the_cycles_below_it():
    policy = make_policy("adaptive", 3)
    teach(policy, (lambda rows: 0.1, lambda rows: 0.1, lambda rows: 5.0), rate=0.4)
    for _ in range(40):
        policy.choose(situation(8, 0, 0))
    assert policy.choose(situation(8, 0, 0)) == Step()
    assert policy.choose(situation(0, 6, 2)) == Fire(1)  # nobody else can run; the main network waits for more
    assert policy.choose(situation(0, 0, 8)) == Fire(2)


def test_costs_of_steps_that_park_count_as_whole_ones():
    """A step leaves out decoders of rows that park: told so, its cost must not look like a cheaper stage."""
    policy = taught(FLAT, rate=0.5)
    assert isinstance(policy, Adaptive)
    assert policy.choose(situation(8, 0)) == Step()
    planner = Planner([np.array([0.0, *range(1, 17)]), np.ones(17)], [0.5])
    assert planner.parking_share(0, 8) == pytest.approx(0.75)  # half of the decoder's half
    policy._planner = planner
    before = policy._costs[0].curve(16)[8]
    for _ in range(100):
        policy.observe(0, 8, 0.75 * before)
    assert policy._costs[0].curve(16)[8] == pytest.approx(before)


# ── what is measured ──────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-6, 10)), min_size=1, max_size=60))
@settings(deadline=None)
def test_costs_never_fall_with_rows_and_are_positive(runs):
    model = CostModel()
    for rows, seconds in [*runs, runs[0]]:
        model.observe(rows, seconds)
    curve = model.curve(256)
    assert curve.shape == (257,)
    assert curve[0] == 0
    assert np.all(curve[1:] > 0)
    assert np.all(np.diff(curve) >= -1e-12)


def test_costs_are_lines_between_what_was_measured_and_go_on_at_their_slope():
    model = CostModel()
    for _ in range(3):
        for rows, seconds in ((2, 1.0), (4, 2.0), (8, 2.5)):
            model.observe(rows, seconds)
    assert model.curve(16)[[1, 2, 3, 4, 6, 8, 16]] == pytest.approx([0.75, 1.0, 1.5, 2.0, 2.25, 2.5, 4.5])


def test_costs_do_not_grow_faster_than_rows_beyond_what_was_measured():
    model = CostModel()
    for _ in range(3):
        model.observe(4, 1.0)
        model.observe(8, 10.0)
    assert model.curve(16)[16] == pytest.approx(20.0)


def test_the_first_run_of_a_bucket_and_a_stray_one_count_for_little():
    model = CostModel()
    model.observe(4, 50.0)  # compiles
    assert not model.is_known
    for _ in range(20):
        model.observe(4, 1.0)
    assert model.is_known
    assert model.curve(4)[4] == pytest.approx(1.0)
    model.observe(4, 50.0)
    assert model.curve(4)[4] == pytest.approx(1.125)
    for _ in range(60):
        model.observe(4, 3.0)
    assert model.curve(4)[4] == pytest.approx(3.0, rel=0.01)


def test_the_boundary_rate_follows_the_last_few_thousand_positions():
    rate = BoundaryRate()
    rate.saw(40, 10)
    assert not rate.is_known
    rate.saw(40, 10)
    assert rate.is_known
    assert rate.value == pytest.approx(0.25)
    for _ in range(1000):
        rate.saw(16, 16)
    assert rate.value > 0.97
    rate.saw(100_000, 0)
    assert rate.value == 0.01  # a lane is never waited for without end


# ── what is best ──────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.01, 1), st.floats(0.001, 10), st.floats(0.001, 10))
@settings(deadline=None)
def test_parking_a_lone_row_costs_what_going_through_does(rate, step, main):
    planner = Planner([np.array([0.0, step]), np.array([0.0, main])], [rate])
    assert planner.gain(1) == pytest.approx(1)
    assert planner.threshold(1, 1) == 1


@given(st.floats(0.05, 1), st.integers(2, 8), st.data())
@settings(max_examples=50, deadline=None)
def test_no_threshold_is_better_than_the_planned_one(rate, rows, data):
    """Against the renewal argument worked out one threshold at a time, from the threshold backwards."""
    rises = st.lists(st.floats(0, 1), min_size=rows, max_size=rows)
    byte, main = (np.concatenate(([0.0], 0.1 + np.cumsum(data.draw(rises)))) for _ in range(2))
    planner = Planner([byte, main], [rate])
    rates = [cycle_rate(planner, rate, rows, threshold) for threshold in range(1, rows + 1)]
    assert planner.gain(rows) * planner.through_rate(rows) == pytest.approx(max(rates))
    assert rates[planner.threshold(1, rows) - 1] == pytest.approx(max(rates))


def cycle_rate(planner: Planner, rate: float, rows: int, threshold: int) -> float:
    """Bytes a second of one cycle, by first-step equations; costs of a step and a fire are the planner's."""
    chances = np.zeros((rows, rows + 1))
    for waiting in range(rows):
        chances[waiting, waiting:] = binomial(rows - waiting, rate)
    steps, fires = planner._parked[0], planner._parked[1]
    seconds, produced = np.zeros(rows + 1), np.zeros(rows + 1)
    seconds[threshold:] = fires[threshold : rows + 1]
    for waiting in reversed(range(threshold)):
        running, onward, stays = rows - waiting, chances[waiting, waiting + 1 :], chances[waiting, waiting]
        seconds[waiting] = (steps[running] + onward @ seconds[waiting + 1 :]) / (1 - stays)
        produced[waiting] = (running + onward @ produced[waiting + 1 :]) / (1 - stays)
    return produced[0] / seconds[0]


def binomial(n: int, rate: float) -> np.ndarray:
    pmf = np.ones(1)
    for _ in range(n):
        pmf = np.convolve(pmf, [1 - rate, rate])
    return pmf


def test_plans_are_made_for_numbers_of_rows_near_by():
    assert [nearest_planned(rows) for rows in range(1, 17)] == list(range(1, 17))
    for rows in range(17, 1000):
        planned = nearest_planned(rows)
        assert abs(planned - rows) <= rows / 16
        assert planned <= 1 << (rows - 1).bit_length()
        assert nearest_planned(planned) == planned
    assert len({nearest_planned(rows) for rows in range(1, 257)}) == 48


def test_thresholds_of_many_rows_lie_between_one_and_all():
    curves = [np.concatenate(([0.0], np.full(64, cost))) for cost in (0.1, 0.1, 1.0)]
    planner = Planner(curves, [0.5, 0.5])
    for stage in (1, 2):
        for rows in range(1, 65):
            assert 1 <= planner.threshold(stage, rows) <= rows
