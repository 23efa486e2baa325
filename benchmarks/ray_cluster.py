"""A Ray cluster on this machine with the application on it, until SIGTERM: `python -m benchmarks.ray_cluster PORT
JSON`.

JSON: the application's settings, as in deploy/ray/serve.yaml. Reached from the loopback only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.server_process import ServerProcess

CORES = 64  # that Ray is told of: how many replicas there are is for the settings to say
OBJECT_STORE_BYTES = 100_000_000
LOG = Path("build/ray-cluster.log")
REPLICA_TITLE = b"ray::ServeReplica:hnet:HnetReplica"


def ray_server(port: int, settings: Mapping[str, Any], log: Path = LOG) -> ServerProcess:
    """Such a cluster in processes of its own, which say in `log` what Ray and they have to say."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.ray_cluster", str(port), json.dumps(settings)]
    return ServerProcess(command, port, "/ready", {"OMP_NUM_THREADS": "1"}, log)


def replica_pids(server: ServerProcess) -> list[int]:
    """The processes of its replicas (Linux)."""
    found = []
    for pid in server.pids():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends while we look
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(REPLICA_TITLE):
                found.append(pid)
    return found


def main() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from server.cluster.application import build

    ended = threading.Event()
    ray.init(num_cpus=CORES, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    for number in (signal.SIGTERM, signal.SIGINT):  # after `init`, which sets its own
        signal.signal(number, lambda *_: ended.set())
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(build(json.loads(sys.argv[2])), name="hnet", route_prefix="/")
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
