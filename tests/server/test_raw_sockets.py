"""Clients that do not behave, by hand, on a real server process: after each of them it is as it was before.

No answer is a 5xx, no row, page or counter is left behind, and the next request is answered as ever.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from answers import events, expected, samples, wait_for
from conftest import ServerProcess, end_process, start_process
from processes import finished
from raw import LEAVINGS, Answer, Leaving, answers, chunked, completion, connect, leave, request, rest, talk, until

from server.connection import MAX_HEAD_BYTES
from server.metrics import FINISH_REASONS

MAX_BODY = 100_000
BODY = completion()
LONG = {"max_tokens": 100_000}  # minutes, were it not for the client that has gone
GAUGES = ("num_requests_running", "num_requests_waiting", "prompt_backlog_bytes", "state_slots_usage_perc")
DEFECT = re.compile(r" 5\d\d [\d.]+ ms id=|Traceback|ERROR")


@dataclass
class Target:
    """The server, its log, and what its engine was told."""

    server: ServerProcess
    log: Path
    journal: Path

    @property
    def url(self) -> str:
        return self.server.url

    def counted(self) -> dict[str, float]:
        with self.server.client() as client:
            return samples(client.get("/metrics").text)

    def submitted(self) -> int:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return sum(json.loads(line)[0] == "submit" for line in lines)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("raw")
    log, journal = directory / "log", directory / "journal"
    settings = {"header_timeout": 0.5, "max_body_bytes": MAX_BODY, "drain_timeout": 1, "log_level": "info"}
    server = start_process(
        settings, log=log, tick_seconds=0.002, max_num_seqs=8, max_model_len=200_000, journal=str(journal)
    )
    yield Target(server, log, journal)
    server.process.send_signal(signal.SIGTERM)
    try:
        assert finished(server)[0] == 0
    finally:
        end_process(server)


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    """What has to hold after every test."""
    yield
    wait_for(lambda: not any(target.counted()[f"hnet_{name}"] for name in GAUGES))
    (golden,) = answers(talk(target.url, request(body=completion(max_tokens=5))))
    assert golden.json["choices"][0]["text"].encode() == expected(b"abc", 5)
    counted = target.counted()
    ended = sum(counted[f'hnet_request_finished_total{{reason="{reason}"}}'] for reason in FINISH_REASONS)
    assert ended == target.submitted()
    assert counted["hnet_engine_restarts_total"] == counted['hnet_request_finished_total{reason="error"}'] == 0
    log = target.log.read_text()
    assert "POST /v1/completions 200 " in log
    assert not DEFECT.search(log)


def text(answer: Answer) -> str:
    """The completion's text, whole or streamed."""
    assert answer.status == 200, answer.body
    pieces = events(answer.body.decode()) if answer.body.startswith(b"data:") else [answer.json]
    return "".join(piece["choices"][0]["text"] for piece in pieces)


def only(data: bytes) -> Answer:
    (answer,) = answers(data)
    return answer


# Requests that stop, come in drops, or are held back


@pytest.mark.parametrize("how", LEAVINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_be_cut_at_every_byte(target: Target, how: Leaving, stream: bool) -> None:
    whole = request(body=completion(stream=stream), ends=False)
    for end in range(len(whole) + 1):
        peer = connect(target.url)
        peer.sendall(whole[:end])
        leave(peer, how)


def test_a_request_may_come_a_byte_at_a_time(target: Target) -> None:
    whole = request(body=BODY)
    assert text(only(talk(target.url, *(whole[at : at + 1] for at in range(len(whole)))))) == "abc"


def test_clients_that_hold_half_a_request_hold_up_nobody_and_are_sent_away(target: Target) -> None:
    whole = request(body=BODY)
    with ExitStack() as stack:
        peers = [stack.enter_context(connect(target.url)) for _ in range(100)]
        for number, peer in enumerate(peers):
            peer.sendall(whole[: number % len(whole)])
        assert text(only(talk(target.url, whole))) == "abc"
        for peer in peers:
            answer = only(rest(peer))
            assert (answer.status, answer.error_code) == (408, "request_not_sent")


# Sizes


@pytest.mark.parametrize(
    "head",
    [
        [b"x: " + b"y" * 60_000],
        [b"x-%d: y" % number for number in range(4000)],
        [b"x-request-id: " + b"y" * 60_000],
        [b"x-request-id: \xff\xfe\x80"],
    ],
    ids=["one header", "many headers", "a long request id", "a request id that is no text"],
)
def test_large_and_odd_headers_within_the_bound_are_let_be(target: Target, head: list[bytes]) -> None:
    assert text(only(talk(target.url, request(*head, body=BODY)))) == "abc"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nx: " + b"y" * 10 * MAX_HEAD_BYTES,
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * MAX_HEAD_BYTES,
        b"GET /" + b"y" * 10 * MAX_HEAD_BYTES,
        request(b"transfer-encoding: chunked", body=b"1;" + b"y" * 10 * MAX_HEAD_BYTES),
        request(b"transfer-encoding: chunked", body=b"1\r\n{\r\n0\r\n" + b"x: y\r\n" * MAX_HEAD_BYTES),
    ],
    ids=["a header", "headers", "a target", "a chunk's extension", "trailers"],
)
def test_heads_and_what_is_like_them_have_a_bound(target: Target, data: bytes) -> None:
    answer = only(talk(target.url, data))
    assert (answer.status, answer.error_code) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "data",
    [
        request(b"content-length: %d" % (MAX_BODY + 1)),
        request(b"content-length: " + b"9" * 18),
        request(body=b"x" * (MAX_BODY + 1)),
        request(b"transfer-encoding: chunked", body=chunked(*[b"x" * 1000] * (MAX_BODY // 1000 + 1))),
        request(b"expect: 100-continue", b"content-length: %d" % (MAX_BODY + 1)),
    ],
    ids=["announced", "announced as huge", "sent", "sent in chunks", "asked for"],
)
def test_a_body_above_the_bound_is_refused_before_it_is_kept(target: Target, data: bytes) -> None:
    answer = only(talk(target.url, data))
    assert (answer.status, answer.error_code) == (413, "body_too_large")


# Framing


@pytest.mark.parametrize(
    "length",
    [b"-5", b"abc", b"+5", b"0x10", b"9" * 30, b"", b"5, 5", b"5 5", b"1e3"],
    ids=repr,
)
def test_a_length_that_is_none_is_a_400(target: Target, length: bytes) -> None:
    answer = only(talk(target.url, request(b"content-length: " + length, body=BODY)))
    assert (answer.status, answer.error_code) == (400, "invalid_http")


@pytest.mark.parametrize(
    "headers",
    [
        (b"content-length: 5", b"content-length: %d" % len(BODY)),
        (b"content-length: 5", b"transfer-encoding: chunked"),
        (b"transfer-encoding: chunked", b"content-length: 5"),
        (b"transfer-encoding: gzip",),
        (b"transfer-encoding: chunked, gzip",),
    ],
    ids=repr,
)
def test_lengths_that_can_be_read_in_two_ways_are_a_400(target: Target, headers: tuple[bytes, ...]) -> None:
    answer = only(talk(target.url, request(*headers, body=chunked(BODY))))
    assert (answer.status, answer.error_code) == (400, "invalid_http")


def test_a_body_shorter_than_its_length_is_waited_for_and_then_given_up(target: Target) -> None:
    answer = only(talk(target.url, request(b"content-length: %d" % (len(BODY) + 3), body=BODY)))
    assert (answer.status, answer.error_code) == (408, "request_not_sent")


def test_what_is_longer_than_its_length_does_not_cost_the_request_its_answer(target: Target) -> None:
    data = request(b"content-length: %d" % len(BODY), body=BODY + b"and more\r\n\r\n", ends=False)
    answer = only(talk(target.url, data))
    assert text(answer) == "abc"
    assert answer.headers["connection"] == "close"


def test_requests_before_a_broken_one_are_answered(target: Target) -> None:
    stream = request(body=completion(stream=True, max_tokens=100), ends=False)
    broken = request(b"transfer-encoding: chunked", body=b"1\r\n{\r\nzz\r\n")
    found = answers(talk(target.url, stream + request(body=BODY, ends=False) + broken))
    assert [text(answer) for answer in found] == ["abc" * 33 + "a", "abc"]


@pytest.mark.parametrize(
    "body",
    [
        chunked(BODY),
        chunked(*(bytes((byte,)) for byte in BODY)),
        chunked(BODY, extension=b';name="value"', trailers=b"x: y\r\nz: \xff\r\n"),
        b"0" * 20 + chunked(BODY),
        b"%X\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    ],
    ids=["one", "a byte each", "extensions and trailers", "leading zeros", "capitals"],
)
def test_bodies_may_come_in_chunks(target: Target, body: bytes) -> None:
    assert text(only(talk(target.url, request(b"transfer-encoding: chunked", body=body)))) == "abc"


@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"-1\r\n", b"\r\n", b"3\r\nabcdef", b"f" * 30 + b"\r\n", b"0x3\r\nabc\r\n", b"3\r\nabc\r\n0\r\n\0\r\n"],
    ids=repr,
)
def test_chunks_that_are_none_are_a_400(target: Target, body: bytes) -> None:
    answer = only(talk(target.url, request(b"transfer-encoding: chunked", body=body)))
    assert (answer.status, answer.error_code) == (400, "invalid_http")


@pytest.mark.parametrize("body", [b"3\r\nabc\r\n", b"ffffffff\r\nabc", b"3", b"3\r\nab", b"0\r\n"], ids=repr)
def test_chunks_that_do_not_come_are_given_up(target: Target, body: bytes) -> None:
    answer = only(talk(target.url, request(b"transfer-encoding: chunked", body=body)))
    assert (answer.status, answer.error_code) == (408, "request_not_sent")


# What is no text


@pytest.mark.parametrize(
    "data",
    [
        b"GET /heal\0th HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: x\n\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\0" * 100,
        b"\x80\x2e\x01\x03\x01",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_a_head_that_is_no_http_is_a_400(target: Target, data: bytes) -> None:
    answer = only(talk(target.url, data))
    assert (answer.status, answer.error_code) == (400, "invalid_http")


@pytest.mark.parametrize(
    "body",
    [b"\0" * 10, b'{"prompt": "a\0b"}', b'{"prompt": "\xc3"}', b'\xff\xfe{"prompt"', b"\xef\xbb\xbf{", b"{}}"],
    ids=repr,
)
def test_a_body_that_is_no_json_is_a_400_and_the_connection_goes_on(target: Target, body: bytes) -> None:
    refused, served = answers(talk(target.url, request(body=body, ends=False), request(body=BODY)))
    assert (refused.status, refused.error_code) == (400, "invalid_json")
    assert text(served) == "abc"


def test_escaped_bytes_of_every_value_may_stand_in_a_target(target: Target) -> None:
    for byte in range(256):
        line = b"GET /v1/models/a%%%02x HTTP/1.1" % byte
        answer = only(talk(target.url, request(line=line)))
        assert (answer.status, answer.error_code) == (404, "model_not_found")


# Versions, methods, targets, other protocols


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_http_1_0_is_answered_without_chunks(target: Target, version: bytes, stream: bool) -> None:
    line = b"POST /v1/completions " + version
    answer = only(talk(target.url, request(line=line, body=completion(stream=stream), ends=version == b"HTTP/1.1")))
    assert text(answer) == "abc"
    assert ("transfer-encoding" in answer.headers) == (stream and version == b"HTTP/1.1")


def test_requests_in_one_packet_are_answered_in_their_order(target: Target) -> None:
    kept = [
        request(line=b"GET /health HTTP/1.1", ends=False),
        request(body=completion(max_tokens=50), ends=False),
        request(line=b"HEAD /health HTTP/1.1", ends=False),
        request(body=b"{", ends=False),
        request(b"transfer-encoding: chunked", body=chunked(completion(stream=True)), ends=False),
        request(line=b"GET /nothing HTTP/1.1", ends=False),
        request(line=b"PUT /v1/completions HTTP/1.1", body=BODY, ends=False),
    ]
    last = request(line=b"GET /version HTTP/1.1") + b"GET /health HTTP/1.1\r\n\r\n"  # after the end nothing is read
    found = answers(talk(target.url, b"".join(kept) + last), bodiless={2})
    assert [answer.status for answer in found] == [200, 200, 405, 400, 200, 404, 405, 200]
    assert text(found[1]).encode() == expected(b"abc", 50)
    assert text(found[4]) == "abc"
    assert found[7].json.keys() == {"version"}


def test_a_client_that_asks_whether_to_go_on_is_told_to(target: Target) -> None:
    with connect(target.url) as peer:
        peer.sendall(request(b"expect: 100-continue", b"content-length: %d" % len(BODY)))
        assert peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(BODY)
        assert text(only(rest(peer))) == "abc"


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"OPTIONS /v1/completions HTTP/1.1", 405),
        (b"OPTIONS * HTTP/1.1", 404),
        (b"TRACE /health HTTP/1.1", 405),
        (b"DELETE /v1/models/fake HTTP/1.1", 405),
        (b"PROPFIND /health HTTP/1.1", 405),
        (b"BREW /health HTTP/1.1", 400),
        (b"CONNECT example.org:443 HTTP/1.1", 400),
        (b"PRI * HTTP/2.0", 400),
        (b"GET http://example.org/health HTTP/1.1", 200),
        (b"GET http://user:secret@example.org:99/health?a=b HTTP/1.1", 200),
        (b"GET http://[example/health HTTP/1.1", 400),
        (b"GET http://example.org:99999/health HTTP/1.1", 400),
        (b"GET //health HTTP/1.1", 404),
        (b"GET /../health HTTP/1.1", 404),
        (b"GET /health/../../etc/passwd HTTP/1.1", 404),
        (b"GET /v1/models/%2e%2e%2f%00%0d%0aset-cookie:x HTTP/1.1", 404),
    ],
    ids=repr,
)
def test_methods_and_targets_are_answered_in_one_way(target: Target, line: bytes, status: int) -> None:
    answer = only(talk(target.url, request(line=line)))
    assert answer.status == status
    assert "set-cookie" not in answer.headers
    if status != 200:
        assert answer.json["error"]


def test_an_answer_to_head_has_no_body(target: Target) -> None:
    (answer,) = answers(talk(target.url, request(line=b"HEAD /v1/models HTTP/1.1")), bodiless={0})
    assert answer.status == 405


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c", b"TLS/1.0"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_wish_for_another_protocol_is_not_heard(target: Target, upgrade: bytes, framing: str) -> None:
    wish = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: " + upgrade, b"http2-settings: AAMAAABkAAQAAP__")
    if framing == "length":
        first = request(*wish, body=BODY, ends=False)
    else:
        first = request(*wish, b"transfer-encoding: chunked", body=chunked(BODY), ends=False)
    assert [text(answer) for answer in answers(talk(target.url, first + request(body=BODY)))] == ["abc", "abc"]
    cut = len(first) - 20  # the body's end comes later
    assert text(answers(talk(target.url, first[:cut], first[cut:] + request(body=BODY)))[0]) == "abc"


# Clients that go away


@pytest.mark.parametrize("how", LEAVINGS)
@pytest.mark.parametrize("stage", ["at once", "while it is answered", "after some events"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_leaves_no_row_behind(target: Target, how: Leaving, stage: str, stream: bool) -> None:
    before = target.submitted()
    peer = connect(target.url)
    peer.sendall(request(body=completion(stream=stream, n=3, **LONG)))
    if stage != "at once":
        wait_for(lambda: target.submitted() == before + 3)
    if stage == "after some events" and stream:
        until(peer, b"data: ")
    leave(peer, how)


@pytest.mark.parametrize("how", LEAVINGS)
def test_so_does_one_that_had_sent_its_next_request_already(target: Target, how: Leaving) -> None:
    peer = connect(target.url)
    peer.sendall(request(body=completion(stream=True, **LONG), ends=False) + request(line=b"GET /health HTTP/1.1"))
    until(peer, b"data: ")
    leave(peer, how)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_and_one_that_reads_nothing_of_its_stream(target: Target, how: Leaving) -> None:
    peer = connect(target.url, receive_buffer=4096)
    written = target.counted()["hnet_generation_bytes_total"]
    peer.sendall(request(body=completion(stream=True, n=8, logprobs=100, max_tokens=2000)))
    wait_for(lambda: target.counted()["hnet_generation_bytes_total"] > written + 1500)  # more than all buffers hold
    leave(peer, how)


def test_a_reader_that_takes_its_time_gets_every_byte(target: Target) -> None:
    with connect(target.url, receive_buffer=4096) as peer:
        peer.sendall(request(body=completion(stream=True, max_tokens=400, logprobs=20)))
        data = b""
        while piece := peer.recv(1000):
            data += piece
            time.sleep(0.001)
    assert text(only(data)).encode() == expected(b"abc", 400)


def test_a_crowd_that_comes_and_goes_leaves_nothing(target: Target) -> None:
    for number in range(60):  # eight rows, so that most of them go while they wait
        peer = connect(target.url)
        peer.sendall(request(body=completion(stream=number % 2 == 0, n=2, **LONG)))
        if number % 3:
            leave(peer, LEAVINGS[number % 2 * 2])
        else:
            with peer:
                wait_for(lambda: target.counted()["hnet_num_requests_running"] > 0)
