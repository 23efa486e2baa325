"""`hnet train` as a command: its mistakes are one line each. What it does tests/training shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from server.cli.main import main


def test_a_missing_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.toml")]) == 1
    assert capsys.readouterr().err == f"hnet: error: {tmp_path}/none.toml: cannot be read: No such file or directory\n"


def test_an_installation_without_training_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "training"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "training", None)
    assert main(["train", str(tmp_path / "any.toml")]) == 1
    assert capsys.readouterr().err == (
        "hnet: error: this installation serves alone; training comes with a checkout or a wheel\n"
    )
