"""A real Prometheus scrapes `hnet serve` under load: its rules load, and every panel has numbers to show."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from answers import wait_for

from deploy.grafana.dashboards import DASHBOARDS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
PANELS = [(panel.title, panel.queries) for each in DASHBOARDS for row in each.rows.values() for panel in row]
# Of events that a healthy server under moderate load does not have: their queries answer with nothing, rightly.
MAY_BE_EMPTY = {"Turned away"}
NEED_A_GPU = {"Static steps"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], url: str, ready: str, log: Path) -> Iterator[httpx.Client]:
    """A process from when it says at the path `ready` that it is, until it is told to end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HNET_")}
    with log.open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=err, stderr=err, env={**environment, "OMP_NUM_THREADS": "1"}
        )
    try:
        with httpx.Client(
            base_url=url, trust_env=False, timeout=60, transport=httpx.HTTPTransport(retries=2)
        ) as client:

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return client.get(ready).status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(is_ready, 60)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus, on the project's own configuration but for address and interval, after load on the demo model."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, own_port = free_port(), free_port()
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "alerts.yaml", folder)
    serve = [sys.executable, "-m", "server.cli.main", "serve", "--port", str(port), "--max-num-seqs", "8"]
    scrape = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{own_port}",
    ]
    with (
        running(serve, f"http://127.0.0.1:{port}", "/ready", folder / "server.log") as server,
        running(scrape, f"http://127.0.0.1:{own_port}", "/-/ready", folder / "prometheus.log") as client,
    ):

        def ask(number: int) -> int:
            body = {
                "prompt": f"Once upon a time {number % 4} in a land far away",
                "max_tokens": 300,
                "ignore_eos": True,
            }
            return server.post("/v1/completions", json=body).status_code

        def scraped() -> float:
            return value(client, "max(hnet_request_finished_total)")

        wait_for(lambda: scraped() >= 0, 20)
        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, range(64))) == {200}
        wait_for(lambda: scraped() == 64, 20)
        yield client


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = client.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def value(client: httpx.Client, expression: str) -> float:
    """Of the first series; −1 where there is none."""
    found = query(client, expression)
    return float(found[0]["value"][1]) if found else -1.0


def test_the_server_is_scraped_and_the_rules_are_evaluated(prometheus: httpx.Client) -> None:
    (target,) = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "hnet-serve")
    (group,) = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    wanted = {rule["alert"] for rule in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]}
    wait_for(lambda: all(rule["health"] == "ok" for rule in evaluated(prometheus)), 20)
    assert {rule["name"] for rule in group["rules"]} == wanted
    assert not [rule["name"] for rule in evaluated(prometheus) if rule["state"] == "firing"]


def evaluated(prometheus: httpx.Client) -> list[dict[str, Any]]:
    return list(prometheus.get("/api/v1/rules").json()["data"]["groups"][0]["rules"])


@pytest.mark.parametrize(("title", "queries"), PANELS, ids=[title for title, _ in PANELS])
def test_a_panel_has_data(title: str, queries: tuple[tuple[str, str], ...], prometheus: httpx.Client) -> None:
    for template, legend in queries:
        expression = template.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*")
        found = query(prometheus, expression)
        if title in NEED_A_GPU:
            assert found == []
            continue
        assert found or title in MAY_BE_EMPTY, expression
        assert any(each["value"][1] != "NaN" for each in found) or title in MAY_BE_EMPTY, expression
        labels = {part.partition("}}")[0] for part in legend.split("{{")[1:]}
        assert all(labels <= set(each["metric"]) for each in found), "the legend names a label that is not there"
