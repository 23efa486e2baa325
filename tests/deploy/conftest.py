from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))  # where the fake server is

from answers import wait_for

ROOT = Path(__file__).parents[2]
SERVER_TESTS = ROOT / "tests" / "server"


@pytest.fixture(scope="session")
def exposition() -> Iterator[dict[str, Metric]]:
    """What the server shows Prometheus, every family by its name, after requests of all kinds have ended."""
    settings = {"port": 0, "in_process": True, "log_level": "warning", "max_waiting_requests": 0}
    engine = {"max_num_seqs": 1, "tick_seconds": 0.002, "prefix_cache": True}
    process = subprocess.Popen(
        [sys.executable, str(SERVER_TESTS / "fake_server.py"), json.dumps(settings), json.dumps(engine), "{}"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SERVER_TESTS)))},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.Client(
            base_url=url, trust_env=False, timeout=20, transport=httpx.HTTPTransport(retries=3)
        ) as client:
            wait_for(lambda: client.get("/ready").status_code == 200)
            for prompt in ("abc", "a!park", "a!preempt", "a!nan"):
                assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 200
            body = {"prompt": "abc", "max_tokens": 500, "stream": True}
            with client.stream("POST", "/v1/completions", json=body):
                assert client.post("/v1/completions", json={"prompt": "abc"}).status_code == 429
            text = client.get("/metrics").text
        yield {family.name: family for family in text_string_to_metric_families(text)}
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
