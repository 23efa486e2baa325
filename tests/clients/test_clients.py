"""Clients that others wrote, unmodified, against the real server: JavaScript's official one, LangChain, LiteLLM.

Each runs in an environment of its own below build/clients, made here once (`make clients`), and prints what it got.
Nothing but the installation leaves this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "clients"
KEY = "a key"
LOCAL = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else LiteLLM downloads it
DOCUMENT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(js|python)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """`hnet serve` on the bundled model, with a key; every client must leave it with no row in use."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HNET_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli.main", "serve", "--port", "0", "--api-key", KEY, "--metrics-public"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.stderr is not None
    try:
        url = next(line for line in process.stderr if " ready at " in line).split(" ready at ")[1].strip()
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it never waits for a reader
        yield url
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def made_of(source: Path, target: Path, make: Any) -> Path:
    """An environment, made anew where what it is made of has changed."""
    mark = target / ".made-of"
    if not mark.exists() or mark.read_text() != source.read_text():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        make(target)
        mark.write_text(source.read_text())
    return target


@pytest.fixture(scope="session")
def python() -> Path:
    requirements = HERE / "requirements.txt"

    def make(target: Path) -> None:
        venv.create(target, with_pip=True)
        pip = [target / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement", requirements]
        subprocess.run(pip, check=True, timeout=500)

    return made_of(requirements, BUILD / "python", make) / "bin" / "python"


@pytest.fixture(scope="session")
def node() -> Path:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")

    def make(target: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "node" / name, target)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=target, check=True, timeout=300)

    target = made_of(HERE / "node" / "package-lock.json", BUILD / "node", make)
    return Path(shutil.copy(HERE / "node" / "client.mjs", target))


def run(*command: str | Path, **environment: str) -> str:
    """What a client printed; it may reach nothing but this machine."""
    blocked = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **blocked, **local, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def found_by(*command: str | Path, **environment: str) -> dict[str, Any]:
    """The object in the last line that a client printed."""
    found: dict[str, Any] = json.loads(run(*command, **environment).splitlines()[-1])
    return found


def reference(url: str, **body: Any) -> str:
    answer = httpx.post(
        f"{url}/v1/completions",
        json={"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0, **body},
        headers={"authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    text: str = answer.json()["choices"][0]["text"]
    return text


def rows_in_use(url: str) -> float:
    metrics = httpx.get(f"{url}/metrics", timeout=20).text
    return float(next(line for line in metrics.splitlines() if line.startswith("hnet_num_requests_running")).split()[1])


def test_javascript(server: str, node: Path) -> None:
    found = found_by("node", node, server, KEY)
    text = reference(server)
    assert found["whole"]["text"] == found["streamed"] == text
    assert found["whole"]["usage"]["completion_tokens"] == found["whole"]["tokens"] == 32
    assert found["chat"]["role"] == "assistant"
    assert found["chat"]["content"] == found["chatStreamed"]
    assert set(found["structured"]) == {"a"}
    assert found["models"] == ["demo"]
    assert found["error"] == {"name": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["missing"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
    assert found["left"] == 3
    deadline = time.monotonic() + 10
    while rows_in_use(server):
        assert time.monotonic() < deadline, "a stream that was left keeps its row"
        time.sleep(0.05)


def test_langchain(server: str, python: Path) -> None:
    found = found_by(python, HERE / "langchain_client.py", server, KEY)
    text = reference(server)
    assert found["whole"] == found["streamed"] == found["batch"][0] == text
    assert found["batch"][1] == reference(server, prompt="The sea")
    assert found["generated"] == {"prompt_tokens": 17, "completion_tokens": 32, "total_tokens": 49}
    assert found["chat"] == found["chat_streamed"] != ""
    assert set(found["structured"]) == {"a"}


def test_litellm(server: str, python: Path) -> None:
    found = found_by(python, HERE / "litellm_client.py", server, KEY, **LOCAL)
    text = reference(server)
    for provider in ("text-completion-openai", "hosted_vllm"):
        assert found[provider]["whole"] == found[provider]["streamed"] == text
        assert found[provider]["usage"]["total_tokens"] == 49
    chats = {found[name][way] for name in ("chat openai", "chat hosted_vllm") for way in ("whole", "streamed")}
    assert chats == {found["later"]}
    assert found["error"] == 400


@pytest.mark.parametrize(("language", "text"), EXAMPLES)
def test_an_example_of_the_document_runs(server: str, python: Path, node: Path, language: str, text: str) -> None:
    assert "http://127.0.0.1:8000" in text
    assert '"none"' in text
    program = text.replace("http://127.0.0.1:8000", server).replace('"none"', f'"{KEY}"')
    if language == "js":
        example = node.with_name("example.mjs")
        example.write_text(program, encoding="utf-8")
        said = run("node", example)
    else:
        said = run(python, "-c", program, **LOCAL)
    for line in re.findall(r"print\(.*\)  # (.*)", text):
        assert line in said
    assert len(said) > 60
