"""The real server process, its engine in another one, on the fake engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from answers import events, expected, wait_for
from conftest import ROOT, ServerProcess
from processes import alive, children, finished

Serve = Callable[..., ServerProcess]


def test_completions_come_through_two_processes_whole_and_streamed(serve_process: Serve) -> None:
    server = serve_process()
    with server.client() as client:
        body = {"prompt": "añb", "max_tokens": 100, "temperature": 0, "logprobs": 3, "return_chunks": True}
        whole = client.post("/v1/completions", json=body).json()["choices"][0]
        pieces = events(client.post("/v1/completions", json={**body, "stream": True}).text)
    assert whole["text"].encode() == expected("añb".encode(), 100)
    assert "".join(event["choices"][0]["text"] for event in pieces) == whole["text"]
    assert [c for event in pieces for c in event["choices"][0]["chunks"]] == whole["chunks"]


def test_the_server_answers_while_the_model_is_loading(serve_process: Serve) -> None:
    server = serve_process(ready=False, load_seconds=1)
    with server.client() as client:
        wait_for(lambda: client.get("/health").status_code == 200)
        unready = client.get("/ready")
        assert (unready.status_code, unready.json()) == (503, {"status": "loading"})
        for answer in (client.post("/v1/completions", json={"prompt": "x"}), client.get("/v1/models")):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "loading"
            assert int(answer.headers["retry-after"]) >= 1
        server.wait_until_ready()
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(serve_process: Serve) -> None:
    server = serve_process(ready=False, failure="model.safetensors: key 'x' is missing")
    code, err = finished(server)
    assert code == 1
    assert err.strip().splitlines() == ["model.safetensors: key 'x' is missing"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("abc!crash", "the fake engine crashed"),
        ("abc!exit", "exit code 7"),
        ("abc!lost", "Encoding objects of type object is unsupported"),
    ],
)
def test_an_engine_that_dies_is_an_error_for_its_requests_and_not_a_dead_port(
    serve_process: Serve, prompt: str, reason: str
) -> None:
    server = serve_process(settings={"max_engine_restarts": 0}, tick_seconds=0.005)
    with server.client() as client:
        others: list[httpx.Response] = []
        whole = threading.Thread(
            target=lambda: others.append(
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 500}, timeout=20)
            )
        )
        whole.start()
        wait_for(lambda: "hnet_num_requests_running 1.0" in client.get("/metrics").text)
        answer = client.post("/v1/completions", json={"prompt": prompt, "stream": True, "temperature": 0})
        *texts, last = events(answer.text)
        assert "".join(event["choices"][0]["text"] for event in texts) == "abc"
        assert last["error"]["code"] == "engine_failed"
        whole.join()
        assert others[0].status_code == 500
        assert others[0].json()["error"]["code"] == "engine_failed"
        assert client.get("/health").status_code == 200
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert reason in ready.json()["status"]
        after = client.post("/v1/completions", json={"prompt": "x"})
        assert (after.status_code, after.json()["error"]["code"]) == (503, "engine_down")
        assert 'hnet_request_finished_total{reason="error"} 2.0' in client.get("/metrics").text
    server.process.send_signal(signal.SIGTERM)
    assert finished(server)[0] == 0


def test_the_engine_ends_when_its_server_is_killed(serve_process: Serve) -> None:
    server = serve_process()
    (engine,) = children(server.process.pid)
    server.process.kill()
    wait_for(lambda: not alive(engine))


def test_an_idle_engine_sleeps_and_is_still_heard_of(serve_process: Serve) -> None:
    server = serve_process()
    (engine,) = children(server.process.pid)
    before = sum(map(int, Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[11:13]))
    time.sleep(1.2)
    after = sum(map(int, Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[11:13]))
    assert (after - before) / os.sysconf("SC_CLK_TCK") < 0.3  # seconds of processor time; spinning would take 1.2
    with server.client() as client:
        assert client.get("/ready").status_code == 200


def test_sigterm_lets_open_streams_finish_while_the_port_stays_open(serve_process: Serve) -> None:
    server = serve_process(tick_seconds=0.01)
    with server.client() as client, server.client() as other:
        (engine,) = children(server.process.pid)
        body = {"prompt": "abc", "max_tokens": 80, "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_text()
            text = next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: other.get("/ready").status_code == 503)
            assert other.get("/ready").json() == {"status": "shutting down"}
            assert other.get("/health").status_code == 200
            refused = other.post("/v1/completions", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) >= 1
            text += "".join(lines)
    assert "".join(event["choices"][0]["text"] for event in events(text)).encode() == expected(b"abc", 80)
    assert finished(server)[0] == 0
    assert not alive(engine)


def test_streams_that_outlast_the_drain_end_with_an_error_and_the_exit_code_is_0(serve_process: Serve) -> None:
    server = serve_process(settings={"drain_timeout": 0.3}, tick_seconds=0.02)
    with server.client() as client:
        whole: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: whole.append(
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 500}, timeout=20)
            )
        )
        thread.start()
        with client.stream(
            "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 500, "stream": True}
        ) as answer:
            lines = answer.iter_text()
            text = next(lines)
            server.process.send_signal(signal.SIGTERM)
            text += "".join(lines)
        thread.join()
    assert events(text)[-1]["error"]["code"] == "shutting_down"
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "shutting_down")
    assert finished(server)[0] == 0


def test_a_second_signal_ends_the_drain_at_once(serve_process: Serve) -> None:
    server = serve_process(tick_seconds=0.05)
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 500, "stream": True}) as answer,
    ):
        lines = answer.iter_text()
        text = next(lines)
        server.process.send_signal(signal.SIGINT)
        with server.client() as other:
            wait_for(lambda: other.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        text += "".join(lines)
    assert events(text)[-1]["error"]["code"] == "shutting_down"
    assert finished(server)[0] == 0


def test_a_signal_while_the_model_loads_ends_the_server(serve_process: Serve) -> None:
    server = serve_process(ready=False, load_seconds=60)
    with server.client() as client:
        wait_for(lambda: client.get("/health").status_code == 200)
    server.process.send_signal(signal.SIGTERM)
    assert finished(server)[0] == 0


def test_an_engine_that_hangs_does_not_keep_the_server_from_ending(serve_process: Serve) -> None:
    constants = {"server.engine_client.STOP_SECONDS": 0.3}
    server = serve_process(settings={"drain_timeout": 0.2}, constants=constants)
    with server.client() as client:
        text = ""
        body = {"prompt": "abc!hang", "max_tokens": 500, "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_text()
            text += next(lines)
            server.process.send_signal(signal.SIGTERM)
            text += "".join(lines)
    assert events(text)[-1]["error"]["code"] == "shutting_down"
    assert finished(server)[0] == 0


def test_the_sockets_directory_is_private_and_gone_at_the_end(serve_process: Serve, tmp_path: Path) -> None:
    old = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(tmp_path)
    try:
        server = serve_process()
    finally:
        os.environ.pop("TMPDIR")
        if old is not None:
            os.environ["TMPDIR"] = old
    (directory,) = tmp_path.glob("hnet-*")
    assert directory.stat().st_mode & 0o077 == 0
    server.process.send_signal(signal.SIGTERM)
    assert finished(server)[0] == 0
    assert not list(tmp_path.glob("hnet-*"))


def test_the_api_process_imports_no_tensors() -> None:
    program = (
        "import sys, server.app, server.serving, server.cli.serve, server.engine_process;"
        "print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_two_servers_do_not_share_a_port(serve_process: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "server.cli.main", "serve", "--port", str(number)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"hnet: error: cannot listen on 127.0.0.1 port {number}: Address already in use"
    ]
