"""A benchmark's figures: their JSON, what they count, and how they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import prefill, roofline
from benchmarks.bandwidth import read_bandwidth
from benchmarks.clients import _agreement
from benchmarks.models import Variant, again, build, override, stage_bytes
from benchmarks.peers import write_report
from benchmarks.report import Row, rows_in_markdown, write_part
from hnet_runtime.config import VOCAB_SIZE
from server.cli import bench

ROOT = Path(__file__).parents[2]


def _rows(path) -> dict[str, dict[str, object]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) == {"benchmark", "commit", "machine", "rows"}
    names = [row["name"] for row in document["rows"]]
    assert len(set(names)) == len(names)
    rows = {row["name"]: row for row in document["rows"]}
    for row in rows.values():
        assert set(row) == {"name", "value", "unit", "ratio_to", "ratio"}
        if row["ratio_to"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / rows[row["ratio_to"]]["value"])
    return rows


def test_roofline_gives_every_ratio_from_its_own_rows(tiny_model, tmp_path):
    path = tmp_path / "figures.json"
    variant = Variant("float32", "torch", None, 1, 3.0)
    report = roofline.measure(tiny_model, variant, [1], [1, 3], 32, 1)
    assert [row.unit for row in report] == ["GB/s", "bytes/s", "bytes/s", "ms", "ms"]
    roofline.finish("roofline", report, path)
    assert len(_rows(path)) == 5


def test_prefill_gives_every_ratio_from_its_own_rows(tiny_model, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["--model", tiny_model, "--kernels", "torch", "--lengths", "16,40", "--rounds", "1"]
    prefill.main([*arguments, "--json", str(path)])
    assert sum("native whole" in name for name in _rows(path)) == 2


def test_weights_of_a_stage_are_counted_once_and_embeddings_not_at_all(tiny):
    config, weights = tiny
    counted = stage_bytes(build(config, weights, Variant(kernels="torch")), weights)
    assert sum(counted) == 4 * (config.num_parameters - VOCAB_SIZE * config.d_model)
    assert counted[1:] == [4 * parameters for parameters in config.parameters_per_stage[1:]]


def test_an_override_gives_every_stage_the_same_mean(tiny):
    config, _ = tiny
    found = override(config, 9.0)
    assert found is not None
    assert found.positions_per_chunk == pytest.approx((3.0, 3.0))
    assert override(config, None) is None


def test_a_model_run_in_another_way_keeps_its_weights(tiny):
    config, weights = tiny
    first = build(config, weights, Variant())
    other = again(first, weights, Variant(threads=2, bytes_per_chunk=1.0))
    assert stage_bytes(other, weights) == stage_bytes(first, weights)


def test_bandwidth_is_a_rate():
    assert read_bandwidth(1 << 20, 1) > 1e6


def test_a_report_page_holds_every_row(tmp_path):
    page = tmp_path / "page.md"
    write_report(page, [Row("theirs", 2.0, "s"), Row("ours", 1.0, "s", "theirs", 0.5)], "hnet bench peers")
    assert "| ours | 1 | s | theirs | 0.50 |" in page.read_text(encoding="utf-8")


def test_a_part_of_a_page_is_replaced_and_its_neighbours_stay(tmp_path):
    page = tmp_path / "page.md"
    write_part(page, "One", ["a", "", "## Below", "b"])
    write_part(page, "Two", ["c"])
    write_part(page, "One", ["d"])
    assert page.read_text(encoding="utf-8") == "# One\n\nd\n\n# Two\n\nc\n"
    before = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    write_part(page, "Three", ["e"])
    assert page.read_text(encoding="utf-8") == before + "\n# Three\n\ne\n"


def test_counts_on_a_page_are_whole_and_measurements_short():
    lines = rows_in_markdown([Row("requests", 123456, "counted"), Row("time", 123.456, "ms")])
    assert lines[2:] == ["| requests | 123456 | counted |  |  |", "| time | 123 | ms |  |  |"]


def test_counts_of_a_tool_stand_beside_those_of_the_server():
    counted = {"requests": 4, "new bytes": 256}
    rows = _agreement("tool", counted, {"requests": 1, "new bytes": 0}, {"requests": 5, "new bytes": 512})
    assert [row.value for row in rows] == [4, 4, 512, 256]
    assert [row.ratio for row in rows] == [None, 1.0, None, 0.5]


def test_bench_outside_a_checkout_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    result = CliRunner().invoke(bench.bench, ["roofline"])
    assert result.exit_code != 0
    assert "checkout" in result.output


def test_bench_hands_options_on(monkeypatch):
    heard: list[list[str]] = []
    monkeypatch.setattr(roofline, "main", heard.append)
    result = CliRunner().invoke(bench.bench, ["roofline", "--rows", "1,4", "--help"])
    assert result.exit_code == 0
    assert heard == [["--rows", "1,4", "--help"]]
