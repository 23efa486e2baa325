"""The house's walls: imports point one way, and bookkeeping never loads torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BOOKKEEPING = [
    "hnet_runtime",
    "hnet_runtime.config",
    "hnet_runtime.engine.messages",
    "hnet_runtime.engine.plan",
    "hnet_runtime.engine.request",
    "hnet_runtime.engine.scheduler",
    "hnet_runtime.engine.snapshots",
    "hnet_runtime.engine.memory",
    "hnet_runtime.engine.planning",
    "hnet_runtime.engine.policies",
    "hnet_runtime.engine.byte_tables",
    "hnet_runtime.engine.json_schemas",
    "hnet_runtime.engine.constraints",
    "hnet_runtime.engine.structure",
    "hnet_runtime.state.prefix",
    "hnet_runtime.engine.stops",
    "hnet_runtime.engine.utf8",
    "hnet_runtime.state.rows",
]


def test_every_contract_of_importlinter_holds():
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [program, "--config", ROOT / ".importlinter", "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("module", BOOKKEEPING)
def test_importing_bookkeeping_does_not_load_torch(module):
    code = f"import sys, {module}; print(sorted(name for name in sys.modules if name.partition('.')[0] == 'torch'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_module_without_torch_is_watched_by_a_contract():
    """The two lists of bookkeeping modules, here and in .importlinter, are one."""
    text = (ROOT / ".importlinter").read_text(encoding="utf-8")
    section = text.partition("[importlinter:contract:bookkeeping-has-no-torch]")[2]
    listed = section.partition("source_modules =")[2].partition("forbidden_modules")[0].split()
    assert sorted(listed) == sorted(module for module in BOOKKEEPING if module != "hnet_runtime")
