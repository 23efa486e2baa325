"""Prompts beside streams: that the benchmark runs and reports what it says. Times are nobody's business here."""

from __future__ import annotations

import json

from benchmarks import beside


def test_a_small_run_reports_gaps_and_first_bytes_for_both_shares(tmp_path, capsys):
    path = tmp_path / "beside.json"
    beside.main(["--streams", "2", "--long-bytes", "300", "--json", str(path)])
    rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for share in ("0.5", "1"):
        gaps = [rows[f"demo share={share} {word} beside"]["value"] for word in ("p50", "p99", "longest")]
        assert 0 < gaps[0] <= gaps[1] <= gaps[2]
        assert rows[f"demo share={share} short beside"]["ratio"] > 0
    assert "2 streams, a prompt of 300 bytes" in capsys.readouterr().out
