"""The Dockerfile, as far as it can be held without building it; deploy/check_image.py holds the image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TARGETS = ("cpu", "cuda")


def stage(name: str) -> str:
    """The instructions of a stage, each on one line."""
    text = re.search(rf"^FROM [^\n]* AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert text is not None, name
    return re.sub(r"\\\n\s*", "", text[1])


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out of the build: the last line that fits it or a folder above decides."""
    verdict = False
    parents = [path, *(str(each) for each in Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            names = parents + ([Path(path).name, *Path(path).parts] if pattern.startswith("**/") else [])
            if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
                verdict = not line.startswith("!")
    return verdict


def test_hadolint_is_content() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_code_installs_no_dependency_again(target: str) -> None:
    dependencies, build = stage(f"{target}-dependencies"), stage(f"{target}-build")
    assert re.findall(r"^COPY (.*)$", dependencies, re.MULTILINE) == [
        "constraints.txt ./",
        "pyproject.toml deploy/requirements.py ./",
    ]
    assert dependencies.index("torch") < dependencies.index("COPY pyproject.toml")
    assert re.findall(r"pip install .*", build) == ["pip install --no-deps --no-build-isolation ."]


@pytest.mark.parametrize("target", TARGETS)
def test_all_that_is_installed_is_pinned(target: str) -> None:
    installs = re.findall(r"pip install ([^\n&]*)", stage(f"{target}-dependencies"))
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in each for each in installs)


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_is_nobody_under_an_init_with_a_health_check(target: str) -> None:
    text = stage(target)
    assert "\nUSER 10001:10001\n" in text
    assert '\nENTRYPOINT ["tini", "--", "hnet"]\nCMD ["serve"]\n' in text
    assert re.search(r"\nHEALTHCHECK .*--start-period=\d+s .*/health", text)
    assert "\nVOLUME /var/cache/hnet\n" in text
    assert {"title", "version", "revision", "licenses"} <= set(re.findall(r"org\.opencontainers\.image\.(\w+)=", text))


def test_both_targets_run_the_same_way() -> None:
    first, second = (stage(target).partition("\nUSER ")[2] for target in TARGETS)
    assert first.strip() == second.strip() != ""


def test_the_build_is_sent_what_an_installation_reads_and_no_more() -> None:
    for path in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "deploy/requirements.py"):
        assert not ignored(path), path
    for path in ("server/app.py", "hnet_runtime/configs/hnet_1stage_L.json", "models/demo/model.safetensors"):
        assert (ROOT / path).is_file()
        assert not ignored(path), path
    for path in (".git/HEAD", ".venv/bin/python", "tests/conftest.py", "build/lib", "server/__pycache__/app.pyc"):
        assert ignored(path), path
    assert ignored("hnet_runtime/ops/native/lib/libhnet_portable.so")


def test_requirements_are_those_of_the_package() -> None:
    def told(*extras: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "deploy/requirements.py", *extras]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told().stdout.splitlines() == project["dependencies"]
    assert told("otel").stdout.splitlines() == project["dependencies"] + project["optional-dependencies"]["otel"]
    assert told("nonsense").returncode != 0
