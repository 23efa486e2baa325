"""The comparison runs from beginning to end, on a text that is far too small to say anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from training.compute import multiplications_per_byte
from training.miniature import CONFIGS, NAMES, miniature
from training.settings import TrainingSettings, load


def settings_of(name: str, tmp_path: Path) -> tuple[TrainingSettings, object]:
    text = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").replace("../../../data/english/", "")
    (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
    for file in ("train.bin", "heldout.bin"):
        (tmp_path / file).write_bytes(b"\xfe" * 10_000)
    return load(tmp_path / "settings.toml")


def test_what_is_compared_computes_alike_and_sees_the_same(tmp_path) -> None:
    wanted = {"one-stage": [5.3], "two-stage": [3.0, 2.5], "bytes": [], "tokens": []}
    found = {}
    for name in NAMES:
        settings, config = settings_of(name, tmp_path)
        tokens = {"vocabulary": settings.vocabulary, "bytes_per_symbol": 3.6} if settings.vocabulary else {}
        found[name] = multiplications_per_byte(config, wanted[name], settings.data.window, **tokens)
        assert settings.schedule.total == 10_000_000
    assert max(found.values()) / min(found.values()) < 1.1, found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_four_are_trained_and_compared(tmp_path, make_documents) -> None:
    (tmp_path / "train.bin").write_bytes(make_documents(600, 1))
    (tmp_path / "heldout.bin").write_bytes(make_documents(40, 2))
    report = tmp_path / "report.md"
    arguments = ["--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--seeds", "1", "--total", "9000"]
    arguments += ["--evaluation-bytes", "4096"]
    result = CliRunner().invoke(miniature, [*arguments, "--report", str(report)], standalone_mode=False)
    assert result.exception is None, result.output
    lines = report.read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:6] == list(NAMES)
