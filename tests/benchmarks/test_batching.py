"""Batching policies compared: ratios, targets and tables of made-up runs, and a small run of each command."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from benchmarks import batching, policy_sim, prefix_cache
from benchmarks.batching import Compared, Foreseen, Ratio, StageCosts, Target, foresee, panels_of, rows_of, targets_of
from benchmarks.course import Counted
from benchmarks.models import Variant, build
from benchmarks.policy_sim import Ceiling, Simulated
from benchmarks.prefix_cache import First, Shared
from hnet_runtime.engine.messages import Usage
from server.cli import bench

COSTS = {0: {1: 0.01, 2: 0.01, 8: 0.02}, 1: {1: 0.1, 2: 0.1, 8: 0.15}}


def simulated(rate: float) -> Simulated:
    return Simulated(rate, 0.1, 0.2, 10, 2.0, 1, 0.1, 0.1)


def counted(rate: float, *gaps: float) -> Counted:
    return Counted(num_bytes=100, ticks=50, seconds=100 / rate, outside=0.0, gaps=gaps)


def made_up(adaptive: tuple[float, float] = (150.0, 210.0), ceiling: float = 200.0) -> Compared:
    runs = {
        "lockstep": [counted(100.0, 0.1, 0.4), counted(120.0, 0.2, 0.5)],
        "aligned": [counted(110.0, 0.1, 0.8), counted(110.0, 0.2, 0.4)],
        "adaptive": [counted(adaptive[0], 0.1, 0.2), counted(adaptive[1], 0.1, 0.3)],
    }
    foreseen = Foreseen(simulated(100.0), simulated(180.0), Ceiling((2,), simulated(ceiling)))
    return Compared(runs, foreseen, bytes_per_chunk=4.0)


# ── ratios and targets ────────────────────────────────────────────────────────────────────────


def test_ratios_are_of_medians_and_their_spread_is_of_rounds():
    compared = made_up()
    ratio = compared.rate_ratio("adaptive")
    assert ratio.value == pytest.approx(180 / 110)
    assert (ratio.least, ratio.most) == pytest.approx((1.5, 1.75))
    assert compared.rate_ratio("lockstep") == Ratio(1.0, 1.0, 1.0)
    gap = compared.gap_ratio("aligned")
    assert (gap.value, gap.least, gap.most) == pytest.approx((0.8 / 0.5, 0.4 / 0.5, 0.8 / 0.4))
    share = compared.ceiling_share()
    assert (share.value, share.least) == pytest.approx((180 / 110 / 2, 0.75))


def test_a_row_count_without_gaps_has_none_to_compare():
    runs = {policy: [counted(100.0)] for policy in batching.POLICIES}
    compared = Compared(runs, made_up().foreseen, 4.0)
    assert math.isnan(compared.gap("lockstep", 0.99))
    assert not Target("gap", compared.gap_ratio("adaptive"), 1.0, "≤").verdict.startswith("met")


@pytest.mark.parametrize(
    ("kind", "figure", "verdict"),
    [
        ("≥", Ratio(1.7, 1.5, 1.9), "met"),
        ("≥", Ratio(1.69, 1.6, 1.75), "missed, within the spread"),
        ("≥", Ratio(1.5, 1.4, 1.6), "missed"),
        ("≤", Ratio(1.7, 1.5, 1.9), "met"),
        ("≤", Ratio(1.8, 1.69, 1.9), "missed, within the spread"),
        ("≤", Ratio(1.9, 1.8, 2.0), "missed"),
    ],
)
def test_a_verdict_is_of_the_medians(kind, figure, verdict):
    assert Target("", figure, 1.7, kind).verdict == verdict


def test_large_shapes_have_targets_of_their_own_and_everyone_the_worst_row_count():
    compared = {4: made_up((100.0, 100.0)), 8: made_up(), 16: made_up((200.0, 240.0), ceiling=400.0)}
    named = {target.name: target for target in targets_of("random:hnet_1stage_L", compared)}
    assert named["8 rows: adaptive ÷ lock-step"].verdict == "missed, within the spread"
    assert named["16 rows: adaptive ÷ lock-step"].verdict == "met"
    assert named["adaptive ÷ lock-step, worst: 4 rows"].figure.value == pytest.approx(100 / 110)
    assert named["adaptive's ÷ ceiling's, worst: 4 rows"].verdict == "missed"
    assert named["p99 chunk gap ÷ lock-step's, worst: 4 rows"].figure.value == pytest.approx(0.3 / 0.5)
    assert len(named) == 5
    assert len(targets_of("demo", compared)) == 3


def test_a_plot_shows_the_ceiling_on_the_measured_lockstep():
    panel = panels_of({8: made_up()})[8]
    assert panel.ceiling == pytest.approx(2 * 110)
    assert panel.points["adaptive"] == pytest.approx((0.3, 180.0))


def test_every_figure_stands_beside_lockstep_of_the_same_rows():
    rows = {row.name: row for row in rows_of("made up", COSTS, {8: made_up()})}
    for row in rows.values():
        if row.ratio_to is not None:
            assert row.ratio == pytest.approx(row.value / rows[row.ratio_to].value)
    assert rows["made up stage 1 rows=8"].ratio == pytest.approx(1.5)
    assert rows["made up rows=8 adaptive p99 gap"].ratio == pytest.approx(0.3 / 0.5)
    assert rows["made up rows=8 ceiling"].ratio_to == "made up rows=8 lockstep simulated"
    assert rows["made up rows=8 adaptive's ratio ÷ the ceiling's"].value == pytest.approx(180 / 110 / 2)


# ── what is foreseen and measured ─────────────────────────────────────────────────────────────


def test_time_outside_the_stages_takes_from_what_the_ceiling_promises():
    costs = {0: {1: 0.01, 8: 0.01}, 1: {1: 0.1, 8: 0.1}}
    free, dear = (foresee(costs, [[4, 5, 6]], 8, 4000, outside) for outside in ({8: 0.0}, {8: 0.1}))
    assert free.ratio > dear.ratio >= 1
    assert dear.lockstep.bytes_per_second < free.lockstep.bytes_per_second


def test_a_tick_pays_what_stages_do_not_take_once():
    run = ({0: {1: 1.0}, 1: {1: 3.0}}, [[2]], 1, 100, 1)
    # Two bytes: one step, and one step with the main network in the same tick.
    through = policy_sim.simulate(batching.make_policy("lockstep", 2), *run, overhead={1: 0.5})
    assert through.bytes_per_second == pytest.approx(2 / (5 + 2 * 0.5))
    parked = policy_sim.simulate(policy_sim.Fixed((1,)), *run, overhead={1: 0.5})
    assert parked.bytes_per_second == pytest.approx(2 / (5 + 3 * 0.5))


def test_costs_are_measured_for_every_stage_and_number_of_rows(tiny):
    config, weights = tiny
    costs = StageCosts(build(config, weights, Variant("float32", "torch", None, 1, 1.0)), [1, 3], steps=4)
    costs.measure(least=2, most=2, seconds=0.0)
    costs.measure(least=1, most=64, seconds=60.0)  # only as often as there is room for
    medians = costs.medians()
    assert {stage: sorted(table) for stage, table in medians.items()} == {stage: [1, 3] for stage in range(3)}
    assert all(seconds > 0 for table in medians.values() for seconds in table.values())


def test_policies_serve_the_same_bytes_and_are_counted_alike(tiny):
    config, weights = tiny
    variant = Variant("float32", "torch", None, 1, 4.0)
    model = build(config, weights, variant)
    policies = batching.policies_for(model)
    for turn in range(4):
        engines = batching.engines_on(model, "tiny", 3, 64, variant, policies, turn)
        assert list(engines) == list(batching.POLICIES)
        assert [engine._scheduler._policy for engine in engines.values()] == list(policies.values())
    courses = batching.serve(engines, batching.prompts(3, drawn=True), 40, seed=1)
    assert list(courses) == list(batching.POLICIES)
    for course in courses.values():
        assert course.counted().num_bytes >= 40
    assert not any(engine.has_work for engine in engines.values())
    # Lock-step's rows end together: all had all their bytes, but for the first and the tenth that warms up.
    assert courses["lockstep"].gained == 120
    assert courses["lockstep"].counted().ticks == 35


# ── the commands ──────────────────────────────────────────────────────────────────────────────


def figures(path) -> dict[str, dict[str, object]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["rows"]}
    assert len(rows) == len(document["rows"])
    for row in rows.values():
        if row["ratio_to"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / rows[row["ratio_to"]]["value"])
    return rows


def test_a_quick_run_of_the_demo_has_all_policies_and_the_ceiling(tmp_path, capsys):
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(bench.bench, ["batching", "--quick", "--json", str(path)], standalone_mode=False)
    assert result.exception is None
    rows = figures(path)
    for count in (1, 4):
        for name in (*batching.POLICIES, "ceiling", "lockstep simulated", "lockstep p99 gap"):
            assert rows[f"demo rows={count} {name}"]["value"] > 0
    assert rows["demo rows=1 bytes a chunk"]["value"] > 1
    assert rows["demo stage 1 rows=4"]["ratio_to"] == "demo stage 1 rows=1"
    assert "targets" in result.output


def test_random_weights_chunk_at_the_mean_that_is_asked_for(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policy_sim, "find_spec", lambda name: None)
    path = tmp_path / "figures.json"
    options = ["--quick", "--rows", "3", "--kernels", "torch", "--dtype", "float32", "--bytes-per-chunk", "4.0"]
    plot = ["--plot", str(tmp_path / "plot.png")]
    batching.main(["--model", tiny_model, *options, *plot, "--json", str(path)])
    rows = figures(path)
    assert 2 < rows[f"{tiny_model} rows=3 bytes a chunk"]["value"] < 8
    said = capsys.readouterr().out
    assert "matplotlib is not installed" in said
    assert "4 bytes a chunk" in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rows", "0,4"], "--rows must be at least 1, not 0"),
        (["--rows", "four"], "--rows"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--max-tokens", "3"], "--max-tokens must be at least 16, not 3"),
    ],
)
def test_options_out_of_range_are_named(options, named, capsys):
    with pytest.raises(SystemExit) as ended:
        batching.main(["--quick", *options])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_chunks_longer_than_a_run_are_said_in_a_line(tiny_model, capsys):
    options = ["--quick", "--rows", "1", "--kernels", "torch", "--dtype", "float32", "--bytes-per-chunk", "1000000"]
    with pytest.raises(SystemExit) as ended:
        batching.main(["--model", tiny_model, *options])
    assert ended.value.code == 2
    assert "--max-tokens 48" in capsys.readouterr().err.splitlines()[-1]


# ── the prefix cache ──────────────────────────────────────────────────────────────────────────


def test_prompts_share_their_prefix_and_no_more():
    first, second = prefix_cache.prompts(1024, 2)
    assert first[:1024] == second[:1024]
    assert first[1024] != second[1024]


def test_a_hit_stands_beside_a_miss():
    def first(seconds: float, cached: int) -> First:
        return First(
            seconds,
            Usage(
                prompt_bytes=1040,
                completion_bytes=4,
                chunks=(200,),
                queue_seconds=0.0,
                prefill_seconds=seconds,
                decode_seconds=0.0,
                cached_bytes=cached,
            ),
        )

    shared = Shared(
        1024, (first(1.0, 0), first(2.0, 0), first(3.0, 0)), tuple(first(0.3, 1024) for _ in range(3)), 10, 20
    )
    rows = {row.name: row for row in prefix_cache.rows_of("x", shared)}
    assert rows["x hit"].ratio == pytest.approx(0.15)
    assert rows["x cached"].ratio == 1
    assert "met" in prefix_cache.line_of(shared)
    slow = Shared(1024, (first(1.0, 0),), (first(0.5, 0),), 10, 20)
    assert "missed" in prefix_cache.line_of(slow)


def test_a_shared_prefix_is_read_once(tmp_path):
    path = tmp_path / "figures.json"
    options = ["prefix", "--model", "demo", "--prefix-bytes", "250", "--requests", "2", "--json", str(path)]
    result = CliRunner().invoke(bench.bench, options, standalone_mode=False)
    assert result.exception is None
    rows = figures(path)
    assert rows["demo cached"]["value"] == 250
    assert rows["demo a cached prefix"]["value"] > 0
    assert rows["demo the cache in the end"]["value"] > rows["demo a cached prefix"]["value"]
