"""One level of offered load, put on a server by locust's processes: what they saw and what the server counted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loadtests.memory import Memory, watched
from loadtests.scenario import Scenario
from loadtests.scrape import Scrape, scrape_idle
from loadtests.stream import Record

ROOT = Path(__file__).parents[1]
USERS_PER_WORKER = 4
START_SECONDS = 60.0  # that locust may take beside the time it was given


@dataclass(frozen=True)
class Target:
    """A server. peer: the model's name at one that is not ours, which is neither scraped nor sent fields of ours.
    memory: bytes that the server has for itself, where we can know."""

    url: str
    peer: str | None = None
    memory: Callable[[], int] | None = None


@dataclass(frozen=True)
class Client:
    """How load is made: processes, the streams they may have open together, and seconds for those open at the end."""

    workers: int = 1
    max_streams: int = 512
    drain: float = 30.0


@dataclass(frozen=True)
class Level:
    """rate: requests a second asked for; started: when, on the records' clock; counted: by the server meanwhile, None
    for a peer; memory: of the server's processes over the level."""

    rate: float
    seconds: float
    warm_up: float
    started: float
    records: tuple[Record, ...]
    counted: Scrape | None
    memory: tuple[Memory, ...] = ()


def measure(target: Target, scenario: Scenario, path: Path, rate: float, client: Client) -> Level:
    """Offers `rate` requests a second for the scenario's seconds; `path` is a new folder for what locust writes.

    Raises RuntimeError with locust's last words if it fails.
    """
    path.mkdir(parents=True)
    (path / "records").mkdir()
    (path / "scenario.json").write_text(scenario.model_dump_json(), encoding="utf-8")
    users = USERS_PER_WORKER * client.workers
    limit = scenario.seconds + client.drain + START_SECONDS
    options = {
        "scenario": path / "scenario.json",
        "host": target.url,
        "users": users,
        "spawn-rate": users,
        "user-rate": rate / users,
        "user-streams": math.ceil(client.max_streams / users),
        "run-time": f"{math.ceil(scenario.seconds)}s",
        "drain": client.drain,
        "stop-timeout": math.ceil(client.drain) + 10,
        "records": path / "records",
        "peer": target.peer or "",
        "json-file": path / "locust",
        "html": path / "locust.html",
        "exit-code-on-error": 0,
        "loglevel": "WARNING",
        **({"processes": client.workers} if client.workers > 1 else {}),
    }
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "users.py"), "--headless"]
    command += ["--only-summary", *(f"--{name}={value}" for name, value in options.items())]
    before = None if target.peer else scrape_idle(target.url)
    with (path / "locust.log").open("w") as log, watched(target.memory, scenario.seconds) as memory:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=limit, check=False)
    if done.returncode:
        words = (path / "locust.log").read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"locust ended with exit code {done.returncode}: {words}")
    counted = scrape_idle(target.url) - before if before else None
    started, records = read_records(path / "records")
    return Level(rate, scenario.seconds, scenario.warm_up, started, records, counted, tuple(memory))


def read_records(path: Path) -> tuple[float, tuple[Record, ...]]:
    """When the last of the users began, and what all of them wrote, in the order in which it was due."""
    started, records = [], []
    for file in path.glob("*.jsonl"):
        head, *lines = file.read_text(encoding="utf-8").splitlines()
        started.append(json.loads(head)["started"])
        records += [Record.from_json(line) for line in lines]
    if not started:
        raise RuntimeError(f"no user of locust's has begun: see {path.parent / 'locust.log'}")
    return max(started), tuple(sorted(records, key=lambda record: record.due))
