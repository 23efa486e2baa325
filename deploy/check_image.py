"""`python deploy/check_image.py IMAGE [--run "docker run"]`: whether it does what docs/deploy.md says.

Starts a container with a read-only root file system and no capabilities, on the host's network; asks from outside.
Needs Python alone. Ends the container it started, whatever comes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

START_SECONDS = 120
STRICT = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


class Container:
    """A container that runs, and the command that talks about it (`docker`, or `podman` with its options)."""

    def __init__(self, run: list[str], image: str, port: int) -> None:
        self.tool, self.url = run[: run.index("run")], f"http://127.0.0.1:{port}"
        self.name = f"hnet-check-{uuid.uuid4().hex[:8]}"
        options = ("--detach", "--name", self.name, "--network", "host", "--env", f"HNET_PORT={port}", *STRICT)
        subprocess.run([*run, *options, image], check=True, stdout=subprocess.DEVNULL)

    def tell(self, *arguments: str) -> str:
        done = subprocess.run([*self.tool, *arguments], check=True, capture_output=True, text=True)
        return (done.stdout + done.stderr).strip()

    def inside(self, *command: str) -> str:
        return self.tell("exec", self.name, *command)

    def state(self, of: str) -> str:
        return self.tell("inspect", "--format", f"{{{{.State.{of}}}}}", self.name)

    def remove(self) -> None:
        subprocess.run([*self.tool, "rm", "--force", self.name], check=False, stdout=subprocess.DEVNULL)

    def status(self, path: str) -> int:
        """The status of a GET; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def stream(self, max_tokens: int) -> list[dict[str, Any]]:
        """The events of a streamed completion, `[DONE]` taken off. Raises ValueError where that is not the last."""
        body = {"prompt": "Once upon a time", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            data = [line[6:].strip() for line in answer.read().decode().splitlines() if line.startswith("data: ")]
        if data[-1:] != ["[DONE]"]:
            raise ValueError(f"the stream ends with {data[-1:]}")
        return [json.loads(item) for item in data[:-1]]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def check(container: Container) -> bool:
    """Prints a line for each thing that is to hold; whether all do."""
    results: list[bool] = []

    def say(what: str, holds: bool) -> None:
        results.append(holds)
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)

    begun = time.monotonic()
    say("/ready", wait_for(lambda: container.status("/ready") == 200, START_SECONDS))
    print(f"     after {time.monotonic() - begun:.1f} s")
    say("runs as user 10001", container.inside("id", "-u") == "10001")
    say("process 1 is tini", container.inside("cat", "/proc/1/comm") == "tini")
    say("its health check passes", container.inside(*health_check(container)) == "")
    say("a streamed completion is whole", length(container.stream(200)) == 200)
    ended: list[int] = []
    reader = threading.Thread(target=lambda: ended.append(length(container.stream(4000))))
    reader.start()
    wait_for(lambda: "hnet_num_requests_running 1.0" in metrics(container), 10)
    container.tell("kill", "--signal", "TERM", container.name)
    say("SIGTERM: /ready turns 503 while a stream is open", wait_for(lambda: container.status("/ready") == 503, 5))
    say("SIGTERM: /health stays 200", container.status("/health") == 200)
    reader.join(60)
    say("SIGTERM: the open stream ends whole", ended == [4000])
    say("SIGTERM: the container ends", wait_for(lambda: container.state("Status") == "exited", 60))
    say("SIGTERM: with exit code 0", container.state("ExitCode") == "0")
    return all(results)


def length(events: list[dict[str, Any]]) -> int:
    """Bytes of a streamed completion."""
    return sum(len(event["choices"][0]["text"].encode()) for event in events)


def metrics(container: Container) -> str:
    with urllib.request.urlopen(f"{container.url}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def health_check(container: Container) -> list[str]:
    """The image's own, as it is declared."""
    image = container.tell("inspect", "--format", "{{.Image}}", container.name)
    (declared,) = json.loads(container.tell("image", "inspect", image))
    command: list[str] = (declared.get("Healthcheck") or declared["Config"]["Healthcheck"])["Test"]
    return command[1:]  # the first is CMD


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--run", default="docker run", help="command that runs a container, with options before `run`")
    parser.add_argument("--port", type=int, default=18000)
    arguments = parser.parse_args()
    container = Container(shlex.split(arguments.run), arguments.image, arguments.port)
    try:
        return 0 if check(container) else 1
    except BaseException:
        print(container.tell("logs", container.name), file=sys.stderr)
        raise
    finally:
        container.remove()


if __name__ == "__main__":
    sys.exit(main())
