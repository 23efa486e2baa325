"""Fixtures of the command line's tests: `hnet` in this process, and as a process of its own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hnet_runtime.ops.native.library import CHOICE, OVERRIDE, open_library
from server.cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """What one call of `hnet` gave."""

    code: int
    raw: bytes
    errors: str

    @property
    def text(self) -> str:
        return self.raw.decode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option from outside, except which native library these tests are run with."""
    for name in list(os.environ):
        if (name.startswith("HNET_") and name not in (CHOICE, OVERRIDE)) or name in ("NO_COLOR", "COLUMNS"):
            monkeypatch.delenv(name)
    if open_library() is None:
        monkeypatch.setenv(CHOICE, "off")  # what is said once of kernels that are not built would be in one test's way


@pytest.fixture
def hnet(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`hnet(*arguments, stdin=b"…")` in this process."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([str(argument) for argument in arguments])
        captured = capfdbinary.readouterr()
        return Result(code, captured.out, captured.err.decode())

    return run


def _heed_interrupts() -> None:
    """As in a terminal. A shell starts its background jobs deaf to Ctrl-C, and so all that they start, tests too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def hnet_process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`hnet_process(*arguments, stdout=…)`: a process of its own, ended when the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        chosen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **chosen.pop("environment", {})}
        command = [sys.executable, "-m", "server.cli.main", *map(str, arguments)]
        started.append(subprocess.Popen(command, env=environment, preexec_fn=_heed_interrupts, **chosen))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="session")
def served() -> Iterator[Callable[[str, Any], Any]]:
    """`served(route, body)`: the JSON that one real `hnet serve` answers on the demo model."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HNET_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli.main", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    greeting = process.stderr.readline().decode()
    url = re.search(r"http://[\w.:]+", greeting)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(route: str, body: Any) -> Any:
        assert url, greeting
        request = urllib.request.Request(
            url[0] + route, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        until = time.monotonic() + 60
        while True:
            try:
                with opener.open(request, timeout=10) as answer:
                    return json.load(answer)
            except OSError:  # not ready yet
                assert time.monotonic() < until
                time.sleep(0.1)

    yield ask
    process.terminate()
    try:
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
