"""The command as it is run: a real server, locust's own processes, a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtests.__main__ import main

ROOT = Path(__file__).parents[2]


def run(*arguments: str, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HNET_")}
    return subprocess.run(
        [sys.executable, "-m", "loadtests", *arguments],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_a_short_run_adds_up(tmp_path: Path) -> None:
    options = ("--rates", "8", "--seconds", "2", "--warm-up", "0.2", "--solo", "2")
    done = run("run", "chat", *options, "--output", str(tmp_path / "run"))
    assert (tmp_path / "run" / "report.json").exists(), done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["faults"] == []
    assert done.returncode == 0, done.stderr
    (level,) = report["levels"]
    assert level["outcomes"]["complete"] > 0
    assert len(level["checks"]) == 6
    assert 1 <= report["compared"]["requests"] <= 2
    locust = json.loads((tmp_path / "run" / "8" / "locust.json").read_text(encoding="utf-8"))
    streams = sum(entry["num_requests"] for entry in locust if entry["name"] == "stream (ms)")
    assert streams == sum(level["outcomes"].values())


@pytest.mark.slow
def test_several_workers_aborts_and_rejections_add_up(tmp_path: Path) -> None:
    limits = ("--server-option=--max-num-seqs=4", "--server-option=--max-waiting-requests=2")
    options = ("--rates", "2,16", "--seconds", "8", "--workers", "2", "--output", str(tmp_path / "run"))
    done = run("run", "mixed", *options, *limits)
    assert (tmp_path / "run" / "report.json").exists(), done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["faults"] == []
    outcomes = report["levels"][-1]["outcomes"]
    assert outcomes["complete"] > 0
    assert outcomes["aborted"] > 0
    assert outcomes["rejected"] > 0
    assert outcomes["broken"] == outcomes["failed"] == 0
    assert report["compared"]["garbled"] == 0
    assert len(list((tmp_path / "run" / "16" / "records").glob("*.jsonl"))) == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "chat", "--url", "http://192.0.2.1:80"), "not on this machine"),
        (("run", "chat", "--peer", "m"), "needs the --url"),
        (("run", "nothing-of-the-kind"), "no scenario"),
        (("run", "chat", "--rates", "2,1"), "have to rise"),
        (("run", "chat", "--workers", "0"), "--workers"),
        (("run", "chat", "--url", "http://127.0.0.1:9"), "metrics"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        main([*arguments, "--output", str(tmp_path / "run")])


def test_scenarios_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    assert "chunk-per-byte" in capsys.readouterr().out


def test_told_to_end_it_ends_what_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests", "run", "chat", "--rates", "1", "--seconds", "60"]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: list(tmp_path.glob("run/1/records/*")), 60)
        started = descendants(process.pid)
        assert len(started) >= 3  # the server, its engine, locust
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 20)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and that they did (Linux)."""
    found = [pid]
    for each in found:
        for thread in Path(f"/proc/{each}/task").iterdir():
            found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found[1:]


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.1)
