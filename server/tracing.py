"""Traces for an OpenTelemetry collector: a span for each HTTP request, and below it what the engine did for it.

Importing this needs the extra `otel`, and nothing imports it unless `--otlp-traces-endpoint` is given. Knows headers,
counts and times; no prompt, completion or salt gets into a span. A thread beside the event loop sends what has ended: a
collector that is slow or gone costs spans, and no request anything.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hnet_runtime import __version__
from hnet_runtime.engine.messages import FinishReason, Request, Tick, Usage
from server.request_id import QUIET
from server.request_log import trace_id

FLUSH_SECONDS = 2.0  # for the spans that are left at the end
COMPLAINT_SECONDS = 60.0  # between two log lines about a collector that takes nothing

_propagator = TraceContextTextMapPropagator()


def open_tracing(endpoint: str) -> Tracing:
    """Traces sent to `endpoint`, the full URL of a collector's OTLP/HTTP port for traces."""
    logging.getLogger(OTLPSpanExporter.__module__).addFilter(_Seldom())
    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint)))


@dataclass(slots=True)
class _Live:
    """A choice that runs, and the HTTP request that asked for it."""

    context: Context
    request: Request
    began: float  # monotonic
    began_ns: int  # since the epoch
    first: float | None = None  # when its first byte came

    def at(self, moment: float) -> int:
        """A monotonic time in nanoseconds since the epoch."""
        return self.began_ns + round((moment - self.began) * 1e9)


class Tracing:
    """Told by the engine's client of every choice (see `engine_client.Observer`), by its layer of every HTTP request.

    A choice is traced where its HTTP request is: a `traceparent` that says "not sampled" is obeyed.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        about = Resource.create({"service.name": "hnet-serve", "service.version": __version__})
        self._provider = TracerProvider(resource=about.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("hnet-serve", __version__)
        self._live: dict[str, _Live] = {}
        self._silent: dict[str, _Live] = {}  # of those, who have no byte yet

    def layer(self, app: ASGIApp) -> ASGIApp:
        """`app`, with a span for every HTTP request but the probes'; it comes below `RequestIds`."""
        return _TracedRequests(app, self._tracer)

    def submitted(self, request: Request, now: float) -> None:
        parent = trace.get_current_span()
        if parent.is_recording():
            live = _Live(trace.set_span_in_context(parent, Context()), request, now, time.time_ns())
            self._live[request.request_id] = self._silent[request.request_id] = live

    def tick(self, tick: Tick, now: float) -> None:
        if not self._silent:
            return
        for output in tick.outputs:
            if output.data and output.request_id in self._silent:
                self._silent.pop(output.request_id).first = now

    def finished(self, request_id: str, reason: FinishReason, usage: Usage | None, now: float) -> None:
        live = self._live.pop(request_id, None)
        self._silent.pop(request_id, None)
        if live is None:
            return
        span = self._tracer.start_span("llm_request", live.context, start_time=live.began_ns)
        span.set_attributes(_asked(live.request))
        span.set_attributes({"hnet.finish_reason": reason, "gen_ai.latency.e2e": now - live.began})
        if live.first is not None:
            span.set_attribute("gen_ai.latency.time_to_first_token", live.first - live.began)
        if usage is not None:
            span.set_attributes(_took(usage))
            self._phases(trace.set_span_in_context(span, Context()), live, usage)
        if reason in ("abort", "error"):
            span.set_status(StatusCode.ERROR, reason)
        span.end(live.at(now))

    def engine_ended(self) -> None:
        """Nothing: what it worked on is told as finished."""

    def _phases(self, context: Context, live: _Live, usage: Usage) -> None:
        """Lays what the engine measured end to end from the submission; a phase that took no time has no span."""
        began = live.began
        for name, seconds in (
            ("queue", usage.queue_seconds),
            ("prefill", usage.prefill_seconds),
            ("decode", usage.decode_seconds),
        ):
            if not seconds:
                continue
            span = self._tracer.start_span(name, context, start_time=live.at(began))
            if name == "decode" and usage.park_seconds:
                inside = trace.set_span_in_context(span, Context())
                about = {"hnet.park.is_sum_of_waits": True}  # many short ones, all over the decoding
                park = self._tracer.start_span("park", inside, start_time=live.at(began), attributes=about)
                park.end(live.at(began + usage.park_seconds))
            began += seconds
            span.end(live.at(began))

    async def close(self) -> None:
        """Ends what is open and sends what is left, for FLUSH_SECONDS at most."""
        for request_id in list(self._live):
            self.finished(request_id, "abort", None, time.monotonic())
        # Not the processor's own patience, which is half a minute.
        thread = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, FLUSH_SECONDS)


class _TracedRequests:
    """A span of kind SERVER around each request; what runs inside finds it as the current one."""

    def __init__(self, app: ASGIApp, tracer: trace.Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        about: dict[str, AttributeValue] = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "hnet.request_id": scope["state"]["request_id"],
        }
        context = _remote_parent(Headers(scope=scope))
        span = self._tracer.start_span(scope["method"], context, SpanKind.SERVER, about)
        token = trace_id.set(trace.format_trace_id(span.get_span_context().trace_id))

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_attribute("error.type", str(message["status"]))
                    span.set_status(StatusCode.ERROR)
            await send(message)

        # An exception's words may hold a client's; the log has them.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                await self._app(scope, receive, watched)
            except Exception as error:
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                trace_id.reset(token)
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.route", route)


class _Seldom(logging.Filter):
    """Lets a record pass every COMPLAINT_SECONDS."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        passes = now >= self._next
        if passes:
            self._next = now + COMPLAINT_SECONDS
        return passes


def _remote_parent(headers: Headers) -> Context:
    """The span that the client says it is in (W3C Trace Context), where it says that and in good form."""
    # Two traceparents make one that is ill-formed, as they should.
    carrier = {"traceparent": ",".join(headers.getlist("traceparent")), "tracestate": headers.getlist("tracestate")}
    return _propagator.extract(carrier, Context())


def _asked(request: Request) -> dict[str, AttributeValue]:
    """vLLM's names, which are OpenTelemetry's where it has one; a token is a byte."""
    params = request.params
    return {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.prompt_tokens": len(request.prompt),
        "hnet.choice": params.choice,
        "hnet.priority": request.priority,
    }


def _took(usage: Usage) -> dict[str, AttributeValue]:
    return {
        "gen_ai.usage.completion_tokens": usage.completion_bytes,
        "gen_ai.latency.time_in_queue": usage.queue_seconds,
        "gen_ai.latency.time_in_model_prefill": usage.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": usage.decode_seconds,
        "gen_ai.latency.time_in_model_inference": usage.prefill_seconds + usage.decode_seconds,
        "hnet.chunks": usage.chunks,
        "hnet.cached_bytes": usage.cached_bytes,
        "hnet.park_seconds": usage.park_seconds,
        "hnet.preemptions": usage.preemptions,
    }
