"""Two replicas on a real Ray cluster on this machine, reached through Ray's HTTP proxy: `make cluster`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from answers import wait_for

from benchmarks.cluster import client_of, hit_rate, lose_one, prompt, stream
from benchmarks.ray_cluster import ray_server, replica_pids
from benchmarks.server_process import ServerProcess, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
pytest.importorskip("ray", reason="needs the extra ray")


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port = free_port()
    settings = {"replicas": 2, "threads": 1, "max_num_seqs": "16", "health_check_period": 2.0}
    log = tmp_path_factory.mktemp("ray") / "log"
    with ray_server(port, settings, log) as server:
        server.wait(180)
        yield server


@pytest.fixture
def http(ray_cluster: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{ray_cluster.port}", timeout=60, trust_env=False) as client:
        yield client


def test_openais_client_streams_from_a_replica(ray_cluster: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{ray_cluster.port}/v1", api_key="-") as client:
        one, other = (
            "".join(
                chunk.choices[0].text
                for chunk in client.completions.create(
                    model="demo", prompt="Once upon a time", max_tokens=40, temperature=0, stream=True
                )
            )
            for _ in range(2)
        )
        chat = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Good morning"}], max_tokens=8
        )
    assert one == other
    assert len(one.encode()) == 40
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 8


def test_responses_are_named_once_and_errors_have_openais_shape(http: httpx.Client) -> None:
    wrong = http.post("/v1/completions", json={"prompt": 5}, headers={"x-request-id": "mine-1"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "prompt"
    assert wrong.headers.get_list("x-request-id") == ["mine-1"]
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/nothing").json()["error"]["code"] == "unknown_url"


def test_a_client_that_leaves_frees_its_row(http: httpx.Client) -> None:
    fields = {"prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}

    def live() -> float:
        found = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in found if line.startswith("hnet_num_requests_running{"))

    with http.stream("POST", "/v1/completions", json=fields) as response:
        lines = response.iter_lines()  # kept: the response is closed with it
        next(lines)
        wait_for(lambda: live() == 1)
    wait_for(lambda: live() == 0)


def test_conversations_find_the_replica_that_knows_them(ray_cluster: ServerProcess) -> None:
    rate, _ = asyncio.run(hit_rate(ray_cluster.port))
    assert rate > 0.7  # five turns of six have all of the one before in the cache


def test_both_replicas_work_under_load(ray_cluster: ServerProcess) -> None:
    async def replicas() -> set[str]:
        async with client_of(ray_cluster.port) as client:
            answers = await asyncio.gather(*(stream(client, prompt(n), 32) for n in range(16)))
        assert all(answer.end == "complete" for answer in answers)
        return {answer.replica for answer in answers}

    assert len(asyncio.run(replicas())) == 2


def test_a_killed_replica_costs_its_open_streams_and_nothing_else(ray_cluster: ServerProcess) -> None:
    loss = asyncio.run(lose_one(ray_cluster.port, ray_cluster))
    ends = [answer.end for answer in loss.streams]
    assert set(ends) == {"complete", "error"}
    assert all(answer.end == "complete" for answer in loss.requests)
    assert loss.unlike == 0
    assert len(replica_pids(ray_cluster)) >= 2


def test_replicas_follow_the_load(tmp_path: Path) -> None:
    port = free_port()
    settings = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "upscale_delay": 1.0,
        "downscale_delay": 3.0,
        "threads": 1,
    }

    async def grow() -> int:
        async with client_of(port) as client:
            running = [asyncio.create_task(stream(client, prompt(n), 1500)) for n in range(24)]
            while not all(task.done() for task in running) and len(replica_pids(server)) < 2:
                await asyncio.sleep(0.5)
            most = len(replica_pids(server))
            assert {answer.end for answer in await asyncio.gather(*running)} == {"complete"}
        return most

    with ray_server(port, settings, tmp_path / "log") as server:
        server.wait(180)
        assert len(replica_pids(server)) == 1
        assert asyncio.run(grow()) == 2
        wait_for(lambda: len(replica_pids(server)) == 1, 90)
