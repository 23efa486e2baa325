"""The simulator's clock and counts by hand, and every policy's promises on it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import policy_sim
from benchmarks.policy_sim import (
    DEFAULT_MAIN,
    Fixed,
    ceiling,
    compare,
    contenders,
    default_costs,
    even_lengths,
    panel,
    plot,
    read_costs,
    simulate,
)
from hnet_runtime.engine.planning import Planner
from hnet_runtime.engine.policies import Fire, Limits, Situation, Step, make_policy

NAMES = ("lockstep", "aligned", "adaptive")


def lockstep_of(costs, lengths, rows, total_bytes, seed):
    return simulate(make_policy("lockstep", len(costs)), costs, lengths, rows, total_bytes, seed)


# ── the clock ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", [make_policy("lockstep", 2), Fixed((1,))])
def test_one_row_pays_the_main_network_once_a_chunk_parked_or_not(policy):
    given = simulate(policy, {0: {1: 1.0}, 1: {1: 3.0}}, [[2]], rows=1, total_bytes=100, seed=1)
    assert given.bytes_per_second == pytest.approx(2 / 5)
    assert (given.p50_gap, given.p99_gap) == pytest.approx((5.0, 5.0))
    assert (given.fires, given.mean_rows_per_fire) == (45, 1.0)


def test_two_rows_that_fire_together_pay_it_once():
    costs = {0: {1: 1.0, 2: 1.0}, 1: {1: 3.0, 2: 3.0}}
    given = simulate(Fixed((2,)), costs, [[1]], rows=2, total_bytes=100, seed=1)
    assert given.bytes_per_second == pytest.approx(2 / 4)  # half a step down, a fire, and its decoders
    assert given.mean_rows_per_fire == 2


def test_a_byte_that_goes_down_two_lanes_pays_every_stage_once():
    costs = {0: {1: 1.0}, 1: {1: 2.0}, 2: {1: 4.0}}
    for policy in (make_policy("lockstep", 3), Fixed((1, 1))):
        given = simulate(policy, costs, [[1], [2]], rows=1, total_bytes=100, seed=1)
        assert given.bytes_per_second == pytest.approx(2 / (3 + 7))
        assert given.p50_gap == pytest.approx(10)


def test_chunks_are_those_of_the_lengths_under_every_policy():
    costs = default_costs(DEFAULT_MAIN["bandwidth-bound"], 2)
    for make in contenders(2).values():
        given = simulate(make(), costs, [[3, 5, 7, 1]], rows=8, total_bytes=8000, seed=3)
        assert 7200 / (given.fires * given.mean_rows_per_fire) == pytest.approx(4, rel=0.02)


def test_a_run_depends_on_its_seed_alone():
    costs = default_costs(DEFAULT_MAIN["compute-bound"], 3)
    runs = [
        simulate(make_policy("adaptive", 3), costs, even_lengths(7.0, 3), rows=6, total_bytes=2000, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_policy_that_runs_nobody_is_refused():
    class Stuck(Fixed):
        def choose(self, situation: Situation) -> Step | Fire:
            return Fire(1)

    costs = {0: {1: 1.0}, 1: {1: 1.0}}
    with pytest.raises(ValueError, match="run nobody"):
        simulate(Stuck((1,)), costs, [4.8], rows=2, total_bytes=10, seed=1)
    with pytest.raises(ValueError, match="costs of stages"):
        simulate(Stuck((1,)), costs, [4.8, 4.8], rows=2, total_bytes=10, seed=1)


# ── promises ──────────────────────────────────────────────────────────────────────────────────


@st.composite
def cost_tables(draw, stages: int):
    return {stage: {1: draw(st.floats(1e-3, 1e-1)), 12: draw(st.floats(1e-3, 1.0))} for stage in range(stages)}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_row_waits_beyond_the_limits_and_nobody_fires_an_empty_lane(data):
    stages = data.draw(st.integers(2, 4))
    limits = Limits(data.draw(st.integers(stages - 1, 20)), data.draw(st.floats(0.01, 2)))
    costs = data.draw(cost_tables(stages))
    lengths = [data.draw(st.floats(1.0, 12.0)) for _ in range(stages - 1)]
    policy = make_policy(data.draw(st.sampled_from(NAMES)), stages, limits)
    given = simulate(
        policy, costs, lengths, data.draw(st.integers(1, 12)), total_bytes=700, seed=data.draw(st.integers())
    )
    assert given.longest_wait_ticks <= limits.max_wait_ticks
    # The tick under way when a limit passes, and a fire of every other lane.
    assert given.longest_wait_seconds <= limits.max_wait_seconds + (stages - 1) * given.longest_tick + 1e-9


@pytest.mark.parametrize("stages", [2, 3])
def test_one_row_is_served_alike_by_every_policy(stages):
    costs = default_costs(DEFAULT_MAIN["bandwidth-bound"], stages)
    runs = [
        simulate(make_policy(name, stages), costs, even_lengths(5.0, stages), 1, total_bytes=5000, seed=1)
        for name in NAMES
    ]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0].longest_wait_ticks == 0


BYTES = {1: 5e-3, 64: 23.9e-3}
GRID = {
    "main linear in rows": {0: BYTES, 1: {1: 10e-3, 64: 640e-3}},
    "main tiny": {0: BYTES, 1: {1: 0.2e-3, 64: 0.4e-3}},
    "all linear": {0: {1: 0.1e-3, 64: 6.4e-3}, 1: {1: 0.05e-3, 64: 3.2e-3}},
    "all flat": {0: {1: 5e-3, 64: 5e-3}, 1: {1: 5e-3, 64: 5e-3}},
    "all alike": {0: BYTES, 1: BYTES},
    "small model": {0: {1: 0.3e-3, 64: 3.5e-3}, 1: {1: 0.5e-3, 64: 3e-3}},
    "main grows faster than rows": {0: BYTES, 1: {1: 10e-3, 2: 12e-3, 4: 30e-3, 8: 120e-3, 16: 0.5, 64: 4.0}},
    "two lanes, middle dear": {0: BYTES, 1: {1: 50e-3, 64: 60e-3}, 2: {1: 10e-3, 64: 640e-3}},
    "two lanes, nothing gained": {0: BYTES, 1: {1: 1e-3, 64: 64e-3}, 2: {1: 10e-3, 64: 640e-3}},
}


@pytest.mark.parametrize("bytes_per_chunk", [1.5, 4.8, 12.0])
@pytest.mark.parametrize("costs", GRID.values(), ids=GRID.keys())
def test_adaptive_never_loses_to_lockstep(costs, bytes_per_chunk):
    for rows in (2, 5, 8, 24):
        run = (costs, even_lengths(bytes_per_chunk, len(costs)), rows, max(600 * rows, 8000), 1)
        given, base = simulate(make_policy("adaptive", len(costs)), *run), lockstep_of(*run)
        assert given.bytes_per_second >= 0.98 * base.bytes_per_second
        assert given.p99_gap <= 1.05 * base.p99_gap  # what little it tries parking for, and chance


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("main", DEFAULT_MAIN.values(), ids=DEFAULT_MAIN.keys())
def test_adaptive_comes_near_the_ceiling_with_shorter_chunk_gaps(main, stages):
    for rows in (4, 8, 16) if stages == 2 else (8,):
        run = (default_costs(main, stages), even_lengths(4.8 if stages == 2 else 7.0, stages), rows, 10_000, 1)
        given = {name: simulate(make_policy(name, stages), *run) for name in ("lockstep", "adaptive")}
        best = ceiling(*run, gap_limit=given["lockstep"].p99_gap)
        assert given["adaptive"].bytes_per_second >= 0.9 * best.simulated.bytes_per_second
        assert given["adaptive"].p99_gap <= given["lockstep"].p99_gap
        assert best.simulated.bytes_per_second >= 1.3 * given["lockstep"].bytes_per_second


def test_the_planner_foresees_what_the_simulator_gives():
    costs = default_costs(DEFAULT_MAIN["compute-bound"], 2)
    curves = [np.array([0.0, *(policy_sim._line(costs[stage])(rows) for rows in range(1, 17))]) for stage in (0, 1)]
    planner = Planner(curves, [1 / 4.8])
    for rows in (4, 8, 16):
        run = (costs, [4.8], rows, 30_000, 1)
        assert lockstep_of(*run).bytes_per_second == pytest.approx(planner.through_rate(rows), rel=0.03)
        fixed = simulate(Fixed((planner.threshold(1, rows),)), *run)
        foreseen = planner.gain(rows) * planner.through_rate(rows)
        assert fixed.bytes_per_second == pytest.approx(foreseen, rel=0.03)


# ── the ceiling and the report ────────────────────────────────────────────────────────────────


def test_the_ceiling_is_the_best_fixed_threshold_and_keeps_its_gap_limit():
    run = (default_costs(DEFAULT_MAIN["compute-bound"], 2), [4.8], 8, 4000, 1)
    each = {threshold: simulate(Fixed((threshold,)), *run) for threshold in range(1, 9)}
    best = ceiling(*run)
    assert best.simulated.bytes_per_second == max(given.bytes_per_second for given in each.values())
    assert best.thresholds is not None
    assert best.simulated == each[best.thresholds[0]]
    limit = sorted(given.p99_gap for given in each.values())[1]
    limited = ceiling(*run, gap_limit=limit)
    assert limited.simulated.p99_gap <= limit < best.simulated.p99_gap
    nothing = ceiling(*run, gap_limit=0.0)
    assert nothing.thresholds is None
    assert nothing.simulated == lockstep_of(*run)


def test_costs_are_read_by_stage_and_rows(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text('{"0": {"1": 0.005, "8": 0.007}, "1": {"1": 0.06}}')
    assert read_costs(path) == {0: {1: 0.005, 8: 0.007}, 1: {1: 0.06}}


def test_costs_are_lines_between_known_rows_and_beyond():
    cost = policy_sim._line({2: 1.0, 4: 2.0, 8: 3.0})
    assert [cost(rows) for rows in (0, 1, 2, 3, 6, 8, 12)] == pytest.approx([0, 0.5, 1, 1.5, 2.5, 3, 4])
    assert policy_sim._line({1: 2.0})(7) == 2.0


def test_the_report_has_every_policy_beside_lockstep(tmp_path, capsys, monkeypatch):
    costs, lengths, figures = tmp_path / "small.json", tmp_path / "lengths.json", tmp_path / "figures.json"
    costs.write_text(json.dumps({0: {1: 0.01}, 1: {1: 0.1}}))
    lengths.write_text("[[4, 6, 5]]")
    monkeypatch.setattr(policy_sim, "find_spec", lambda name: None)
    options = ["--rows", "1,3", "--total-bytes", "600", "--plot", str(tmp_path / "plot.png"), "--json", str(figures)]
    policy_sim.main(["--costs", str(costs), "--lengths", str(lengths), *options])
    said = capsys.readouterr().out
    assert "matplotlib is not installed" in said
    rows = {row["name"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows["small 3 adaptive"]["ratio_to"] == "small 3 lockstep"
    assert rows["small 3 lockstep"]["ratio"] == 1
    assert rows["small 3 ceiling"]["ratio"] > 1.3
    assert rows["small 1 adaptive p99 gap"] == {
        "name": "small 1 adaptive p99 gap",
        "value": pytest.approx(1e3 * (6 * 0.01 + 0.1)),
        "unit": "ms",
        "ratio_to": "small 1 lockstep p99 gap",
        "ratio": 1.0,
    }
    for name in contenders(2):
        assert math.isfinite(rows[f"small 3 {name} p50 gap"]["value"])


def test_a_plot_has_a_panel_for_each_row_count(tmp_path):
    pytest.importorskip("matplotlib")
    costs = {0: {1: 0.01}, 1: {1: 0.1}}
    path = tmp_path / "plot.png"
    plot(path, "small", {rows: panel(*compare(costs, [4.8], rows, 600, 1)) for rows in (1, 2, 3, 4)})
    assert path.read_bytes().startswith(b"\x89PNG")
