"""A model's Jinja template in a real server: rendered in a process of its own, which does not outlive the server."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import wait_for
from conftest import ServerProcess
from processes import alive, children

HELLO: Any = [{"role": "user", "content": "Hello"}]
LOOPS = "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


@pytest.fixture
def server(tmp_path: Path, serve_process: Callable[..., ServerProcess]) -> ServerProcess:
    template = tmp_path / "mine.jinja"
    template.write_text(LOOPS)
    return serve_process({"chat_template": str(template)})


def ask(client: httpx.Client, n: int = 1) -> httpx.Response:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 5, "chat_template_kwargs": {"n": n}}
    return client.post("/v1/chat/completions", json=body)


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def renderer(server: ServerProcess) -> int:
    """The process id of the one that renders, once there is one."""
    found = [
        pid
        for pid in children(server.process.pid)
        if b"server.template_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    (pid,) = found
    return pid


def test_a_renderer_that_was_ended_is_followed_by_another(server: ServerProcess) -> None:
    with server.client() as client:
        assert content(ask(client)) == "Hello"
        first = renderer(server)
        assert content(ask(client)) == "Hello"
        assert renderer(server) == first
        refused = ask(client, n=90000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "chat_template_error")
        assert not alive(first)
        assert content(ask(client)) == "Hello"
        assert renderer(server) != first


def test_it_ends_with_the_server(server: ServerProcess) -> None:
    with server.client() as client:
        assert content(ask(client)) == "Hello"
    pid = renderer(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not alive(pid)


def test_it_does_not_outlive_a_server_that_is_killed(server: ServerProcess) -> None:
    with server.client() as client:
        assert content(ask(client)) == "Hello"
    pid = renderer(server)
    server.process.kill()
    server.process.wait(20)
    wait_for(lambda: not alive(pid))
