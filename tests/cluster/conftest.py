"""Clusters for the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Where the fake engine's factory, `answers` and `local_cluster` are found by name; behind what others are found by.
sys.path.append(str(Path(__file__).parents[1] / "server"))
sys.path.append(str(Path(__file__).parent))

from local_cluster import Cluster

from server.settings import ServerSettings


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """Starts clusters: `cluster("a", "b", api_key=("secret",), seconds_per_tick=0.01)`."""
    started: list[Cluster] = []

    def start(*names: str, settings: dict[str, Any] | None = None, **engine: Any) -> Cluster:
        chosen = {"in_process": True, "log_level": "warning", **(settings or {})}
        started.append(Cluster(names, ServerSettings(**chosen), **engine))
        return started[-1]

    yield start
    for each in started:
        each.stop()
