"""Every Triton op of a step against its twin in the interpreter: one process for all cases, one test here an op."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
CASES = [Path(__file__).with_name(name) for name in ("step_cases.py", "boundary_cases.py")]
FUNCTIONS = [
    name
    for cases in CASES
    for name in re.findall(r"^def (test_\w+)\(", cases.read_text(encoding="utf-8"), re.MULTILINE)
]

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each function's cases gave: "" where one passed, else what pytest said.

    Whether a kernel is interpreted is decided when its module is imported, so that it takes a process of its own.
    """
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *CASES],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert report.exists(), process.stdout + process.stderr
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        said = [f"{case.get('name')}: {bad.text}" for tag in ("failure", "error") for bad in case.iter(tag)]
        found.setdefault(str(case.get("name")).partition("[")[0], []).append("\n".join(said))
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_kernel_is_its_twin(outcomes, function):
    cases = outcomes.get(function, [])
    assert cases, "no case ran"
    failures = [case for case in cases if case]
    assert not failures, f"{len(failures)} of {len(cases)} cases:\n" + "\n".join(failures[:3])
