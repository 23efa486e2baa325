from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import wait_for
from conftest import Running, ServerProcess
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from processes import finished

from hnet_runtime.engine.messages import Output, Request, SamplingParams, Tick, Usage
from server import tracing
from server.settings import ServerSettings
from server.tracing import Tracing

ROOT = Path(__file__).parents[2]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1,other=2"}
NOWHERE = "http://127.0.0.1:9/v1/traces"  # where nobody listens


class Spans:
    """What was traced, in memory."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._memory))

    def __call__(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._memory.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self(name)
        return span

    @property
    def names(self) -> list[str]:
        return sorted(span.name for span in self._memory.get_finished_spans())


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def traced(
    spans: Spans, serve_in_thread: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., httpx.Client]:
    """A client of a server on the fake engine whose traces are `spans`."""
    monkeypatch.setattr(tracing, "open_tracing", lambda endpoint: spans.tracing)

    def serve(settings: dict[str, Any] | None = None, **engine: Any) -> httpx.Client:
        return serve_in_thread({"otlp_traces_endpoint": NOWHERE, **(settings or {})}, **engine).client()

    return serve


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def asked(request_id: str = "cmpl-a-0-0") -> Request:
    return Request(request_id=request_id, prompt=b"abc", params=SamplingParams(max_tokens=9, temperature=0.5, choice=1))


def took(**changes: Any) -> Usage:
    numbers: dict[str, Any] = {
        "prompt_bytes": 3,
        "completion_bytes": 5,
        "chunks": (2, 1),
        "queue_seconds": 1.0,
        "prefill_seconds": 2.0,
        "decode_seconds": 4.0,
        "cached_bytes": 1,
        "park_seconds": 3.0,
        "preemptions": 2,
        **changes,
    }
    return Usage(**numbers)


def run(spans: Spans, route: Callable[[], None], **headers: str) -> None:
    """One HTTP request below the layer, whose route does what `route` does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        route()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ignore(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/x", "scheme": "http", "state": {"request_id": "r1"}}
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(spans.tracing.layer(app)({**scope, "headers": sent}, ignore, ignore))  # type: ignore[arg-type]


def test_a_choice_is_laid_out_in_its_phases(spans: Spans) -> None:
    began = time.monotonic()
    run(spans, lambda: spans.tracing.submitted(asked(), began), **SAMPLED)
    spans.tracing.tick(Tick(outputs=(Output(request_id="cmpl-a-0-0"),)), began + 3)
    spans.tracing.tick(Tick(outputs=(Output(request_id="cmpl-a-0-0", data=b"x"),)), began + 3.5)
    spans.tracing.tick(Tick(outputs=(Output(request_id="cmpl-a-0-0", data=b"y"),)), began + 4)
    spans.tracing.finished("cmpl-a-0-0", "length", took(), began + 7.5)

    assert spans.names == ["POST", "decode", "llm_request", "park", "prefill", "queue"]
    choice, decode = spans.one("llm_request"), spans.one("decode")
    assert is_child(choice, spans.one("POST"))
    assert all(is_child(spans.one(name), choice) for name in ("queue", "prefill", "decode"))
    assert is_child(spans.one("park"), decode)
    took_seconds = {name: seconds(spans.one(name)) for name in ("queue", "prefill", "decode", "park", "llm_request")}
    assert took_seconds == pytest.approx({"queue": 1, "prefill": 2, "decode": 4, "park": 3, "llm_request": 7.5})
    assert spans.one("queue").start_time == choice.start_time
    assert spans.one("queue").end_time == spans.one("prefill").start_time
    assert spans.one("prefill").end_time == decode.start_time == spans.one("park").start_time
    assert spans.one("park").attributes == {"hnet.park.is_sum_of_waits": True}
    assert choice.status.status_code == StatusCode.UNSET
    assert choice.attributes is not None
    latency = "gen_ai.latency."
    assert {name.removeprefix(latency): value for name, value in choice.attributes.items() if latency in name} == (
        pytest.approx(
            {
                "time_in_queue": 1.0,
                "time_in_model_prefill": 2.0,
                "time_in_model_decode": 4.0,
                "time_in_model_inference": 6.0,
                "time_to_first_token": 3.5,
                "e2e": 7.5,
            }
        )
    )
    assert {name: value for name, value in choice.attributes.items() if latency not in name} == {
        "gen_ai.request.id": "cmpl-a-0-0",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 5,
        "hnet.choice": 1,
        "hnet.priority": 0,
        "hnet.chunks": (2, 1),
        "hnet.cached_bytes": 1,
        "hnet.park_seconds": 3.0,
        "hnet.preemptions": 2,
        "hnet.finish_reason": "length",
    }


def test_the_clients_span_is_the_parent_and_its_state_is_kept(spans: Spans) -> None:
    run(spans, lambda: spans.tracing.submitted(asked(), time.monotonic()), **SAMPLED)
    spans.tracing.finished("cmpl-a-0-0", "stop", took(), time.monotonic())
    http = spans.one("POST")
    assert http.kind == SpanKind.SERVER
    assert http.parent is not None
    assert format_span_id(http.parent.span_id) == SPAN
    assert http.parent.is_remote
    for name in spans.names:
        context = spans.one(name).context
        assert (format_trace_id(context.trace_id), context.trace_state.to_header()) == (TRACE, "vendor=1,other=2")


def test_a_client_that_does_not_sample_is_obeyed(spans: Spans) -> None:
    run(spans, lambda: spans.tracing.submitted(asked(), 0.0), traceparent=f"00-{TRACE}-{SPAN}-00")
    spans.tracing.finished("cmpl-a-0-0", "stop", took(), 1.0)
    assert spans.names == []


@pytest.mark.parametrize(
    "traceparent",
    [
        *("", "what", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-01-more", f"ff-{TRACE}-{SPAN}-01"),
        *(f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01", "0" * 5000),
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
    ],
)
def test_an_ill_formed_traceparent_begins_a_new_trace(spans: Spans, traceparent: str) -> None:
    run(spans, lambda: None, traceparent=traceparent)
    http = spans.one("POST")
    assert http.parent is None
    assert format_trace_id(http.context.trace_id) != TRACE


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_ends_badly_says_so(spans: Spans, reason: Any) -> None:
    run(spans, lambda: spans.tracing.submitted(asked(), 0.0))
    spans.tracing.finished("cmpl-a-0-0", reason, None, 2.0)
    choice = spans.one("llm_request")
    assert (choice.status.status_code, choice.status.description) == (StatusCode.ERROR, reason)
    assert seconds(choice) == pytest.approx(2.0)
    assert choice.attributes is not None
    assert "gen_ai.latency.time_to_first_token" not in choice.attributes


def test_what_is_open_at_the_end_is_ended(spans: Spans) -> None:
    run(spans, lambda: spans.tracing.submitted(asked(), time.monotonic()))
    asyncio.run(spans.tracing.close())
    assert spans.one("llm_request").status.description == "abort"


def test_what_no_http_request_asked_for_is_not_traced(spans: Spans) -> None:
    spans.tracing.submitted(asked(), 0.0)
    spans.tracing.finished("cmpl-a-0-0", "stop", took(), 1.0)
    assert spans.names == []


def test_a_served_request_has_a_span_and_each_choice_one_below_it(
    spans: Spans, traced: Callable[..., httpx.Client], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hnet.request")
    with traced() as client:
        body = {"prompt": "secret !park", "max_tokens": 6, "n": 2, "stream": True}
        assert client.post("/v1/completions", json=body, headers={**SAMPLED, "x-request-id": "r7"}).status_code == 200
        client.get("/health")
        client.get("/metrics")
        wait_for(lambda: len(spans.names) == 11)
    http = spans.one("POST /v1/completions")
    assert http.attributes == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "hnet.request_id": "r7",
    }
    choices = spans("llm_request")
    assert [is_child(choice, http) for choice in choices] == [True, True]
    assert spans.names.count("park") == 2
    told = [record.getMessage() for record in caplog.records if record.name == "hnet.request"]
    assert [line.endswith(f" trace_id={TRACE}") for line in told] == [True, True]
    for span in (http, *choices):
        assert "secret" not in span.to_json()


@pytest.mark.parametrize(("flag", "num_spans"), [("01", 1), ("00", 0)])
def test_the_log_has_the_trace_whether_it_is_sampled_or_not(
    spans: Spans,
    traced: Callable[..., httpx.Client],
    caplog: pytest.LogCaptureFixture,
    flag: str,
    num_spans: int,
) -> None:
    caplog.set_level(logging.INFO, logger="hnet.request")
    with traced() as client:
        client.post("/v1/score", json={"input": "abc"}, headers={"traceparent": f"00-{TRACE}-{SPAN}-{flag}"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hnet.request"]
    assert line.endswith(f" trace_id={TRACE}")
    assert len(spans("llm_request")) == num_spans


@pytest.mark.parametrize(
    ("path", "body", "status", "name"),
    [
        ("/v1/completions", {"prompt": 1}, 400, "POST /v1/completions"),
        ("/v1/nothing", {}, 404, "POST"),
    ],
)
def test_a_request_that_is_refused_is_no_error_of_ours(
    spans: Spans, traced: Callable[..., httpx.Client], path: str, body: Any, status: int, name: str
) -> None:
    with traced() as client:
        assert client.post(path, json=body).status_code == status
        wait_for(lambda: spans(name))
    assert spans.names == [name]
    http = spans.one(name)
    assert http.attributes is not None
    assert http.attributes["http.response.status_code"] == status
    assert http.status.status_code == StatusCode.UNSET


def test_an_engine_that_fails_ends_its_spans_with_an_error(spans: Spans, traced: Callable[..., httpx.Client]) -> None:
    with traced() as client:
        body = {"prompt": ["abc!crash", "de"], "temperature": 0, "max_tokens": 50}
        assert client.post("/v1/completions", json=body).status_code == 500
        wait_for(lambda: len(spans.names) == 3)
    http = spans.one("POST /v1/completions")
    assert (http.status.status_code, http.attributes["error.type"]) == (StatusCode.ERROR, "500")  # type: ignore[index]
    assert [span.status.description for span in spans("llm_request")] == ["error", "error"]


def test_a_client_that_goes_away_leaves_an_aborted_span(spans: Spans, traced: Callable[..., httpx.Client]) -> None:
    body = {"prompt": "abc", "max_tokens": 500, "stream": True}
    with traced(tick_seconds=0.005) as client, client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_text())
    wait_for(lambda: spans("llm_request") and spans("POST /v1/completions"))
    assert spans.one("llm_request").status.description == "abort"


class Collector:
    """Takes OTLP over HTTP on a port of loopback."""

    def __init__(self, status: int = 200) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if status == 200:
                    collector.requests.append(ExportTraceServiceRequest.FromString(data))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    @property
    def spans(self) -> list[Any]:
        scopes = [scope for request in self.requests for each in request.resource_spans for scope in each.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_collector_gets_the_spans_of_a_real_server_by_its_end(
    serve_process: Callable[..., ServerProcess], collector: Collector
) -> None:
    server = serve_process({"otlp_traces_endpoint": collector.url})
    with server.client() as client:
        body = {"prompt": "abc", "max_tokens": 4}
        assert client.post("/v1/completions", json=body, headers=SAMPLED).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert finished(server)[0] == 0
    by_name = {span.name: span for span in collector.spans}
    assert set(by_name) == {"POST /v1/completions", "llm_request", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in by_name.values()} == {TRACE}
    assert by_name["POST /v1/completions"].parent_span_id.hex() == SPAN
    assert by_name["llm_request"].parent_span_id == by_name["POST /v1/completions"].span_id
    (resource,) = {request.resource_spans[0].resource.SerializeToString() for request in collector.requests}
    assert b"hnet-serve" in resource


def test_a_collector_that_is_gone_costs_no_request_and_one_line(serve_process: Callable[..., ServerProcess]) -> None:
    server = serve_process({"otlp_traces_endpoint": NOWHERE})
    with server.client() as client:
        for _ in range(30):
            assert client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4}).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    code, log = finished(server)  # fails where the spans that are left hold it up
    assert code == 0
    assert len(log.splitlines()) == 1
    assert "127.0.0.1" in log


def test_complaints_about_a_collector_are_seldom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("test.seldom")
    logger.addFilter(tracing._Seldom())
    for _ in range(5):
        logger.error("gone")
    later = time.monotonic() + tracing.COMPLAINT_SECONDS
    monkeypatch.setattr(tracing.time, "monotonic", lambda: later)
    logger.error("still gone")
    assert [record.getMessage() for record in caplog.records] == ["gone", "still gone"]


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://a/b", "http://", "http://[a"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_traces_endpoint must be an HTTP URL"):
        ServerSettings(otlp_traces_endpoint=endpoint)


def test_without_the_extra_the_server_runs_and_says_what_is_missing() -> None:
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto")):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import server.serving
from server.cli.main import main
sys.exit(main(["serve", "--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--otlp-traces-endpoint needs the extra otel: pip install 'hnet-serve[otel]'" in result.stderr
