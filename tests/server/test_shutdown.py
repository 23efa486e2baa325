"""SIGTERM at every moment, on the real process: idle, while a prompt is read, and with a client that does not read.

In the middle of streams, while the model loads and with an engine that hangs: `test_server_process`. An engine that is
killed or hangs while the server goes on: `test_watchdog`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from answers import events, samples, wait_for
from conftest import ServerProcess
from processes import alive, children, finished
from raw import completion, connect, request, rest, until

Serve = Callable[..., ServerProcess]


def terminate(server: ServerProcess) -> str:
    """Sends SIGTERM; the server must end in order, its engine too. Gives its log."""
    engines = children(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    code, log = finished(server)
    assert code == 0
    assert "Traceback" not in log
    assert not any(map(alive, engines))
    return log


def test_an_idle_server_ends_at_once_whatever_connections_are_open(serve_process: Serve) -> None:
    server = serve_process(settings={"drain_timeout": 600, "log_level": "info"})
    with connect(server.url) as silent, connect(server.url) as half, connect(server.url) as kept:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le")
        kept.sendall(request(line=b"GET /health HTTP/1.1", ends=False))
        until(kept, b'{"status":"ok"}')
        assert "0 live requests" in terminate(server)
        assert rest(silent) == rest(half) == rest(kept) == b""


@pytest.mark.parametrize(("drain_timeout", "is_patient"), [(30, True), (0.1, False)])
def test_prompts_that_are_being_read_are_answered_or_told(
    serve_process: Serve, tmp_path: Path, drain_timeout: float, is_patient: bool
) -> None:
    """The tick in which the second prompt is read is still under way when the signal comes."""
    journal = tmp_path / "journal"
    constants = {"server.engine_client.STOP_SECONDS": 0.2}
    server = serve_process(
        settings={"drain_timeout": drain_timeout}, tick_seconds=0.7, journal=str(journal), constants=constants
    )
    found: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        with server.client() as client:
            found.append(client.post("/v1/completions", content=completion(max_tokens=2, stream=stream)))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_for(lambda: journal.exists() and journal.read_text().count("submit") == 2)
    terminate(server)
    for thread in threads:
        thread.join(20)
    whole, stream = sorted(found, key=lambda answer: answer.headers["content-type"])
    if is_patient:
        assert whole.json()["choices"][0]["text"] == "ab"
        assert "".join(event["choices"][0]["text"] for event in events(stream.text)) == "ab"
    else:
        assert (whole.status_code, int(whole.headers["retry-after"])) == (503, 1)
        assert whole.json()["error"]["code"] == events(stream.text)[-1]["error"]["code"] == "shutting_down"


def test_a_client_that_does_not_read_keeps_no_server_from_ending(serve_process: Serve) -> None:
    server = serve_process(
        settings={"drain_timeout": 0.3}, max_model_len=10_000, constants={"server.serving.CLOSE_SECONDS": 0.5}
    )
    with server.client() as client, connect(server.url, receive_buffer=4096) as peer:
        peer.sendall(request(body=completion(stream=True, n=4, max_tokens=5000, logprobs=100)))
        # What it does not take is more than all buffers hold.
        wait_for(lambda: samples(client.get("/metrics").text)["hnet_generation_bytes_total"] > 4000)
        terminate(server)
