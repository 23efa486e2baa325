"""`GET /metrics`: the server's numbers under the names operators and autoscalers rely on.

Reads `server.metrics`, the engine's client and the gate at the moment of a scrape; a registry of
its own, so that two servers in one process do not share a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

from server.admission import REASONS
from server.metrics import Histogram, Metrics
from server.probes import unready
from server.service import Service

# Ours under vLLM's names, for dashboards, autoscalers and gateways that look for those: its token is our byte.
VLLM = {
    "num_requests_running": "num_requests_running",
    "num_requests_waiting": "num_requests_waiting",
    "kv_cache_usage_perc": "kv_cache_usage_perc",
    "prompt_bytes": "prompt_tokens",
    "generation_bytes": "generation_tokens",
    "prefix_cache_queries_bytes": "prefix_cache_queries",
    "prefix_cache_hits_bytes": "prefix_cache_hits",
    "num_preemptions": "num_preemptions",
    "request_finished": "request_success",
    "time_to_first_byte_seconds": "time_to_first_token_seconds",
    "inter_byte_latency_seconds": "inter_token_latency_seconds",
    "time_per_output_byte_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "request_queue_time_seconds": "request_queue_time_seconds",
    "request_prefill_time_seconds": "request_prefill_time_seconds",
    "request_decode_time_seconds": "request_decode_time_seconds",
    "request_prompt_bytes": "request_prompt_tokens",
    "request_generation_bytes": "request_generation_tokens",
}

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_PLAIN_0_0_4: {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format."""
    registry: CollectorRegistry = request.app.state.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def build_registry(service: Service, metrics: Metrics) -> CollectorRegistry:
    """A registry that shows one server's numbers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ServerCollector(service, metrics))
    return registry


class _ServerCollector(Collector):
    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        families = [*self._gauges(), *self._counters(), *self._histograms()]
        yield from families
        if self._service.settings.metrics_compat == "vllm" and self._service.client.info is not None:
            for family in families:
                if family.name.removeprefix("hnet_") in VLLM:
                    yield _as_vllm(family, self._service.model_name)

    def _gauges(self) -> Iterator[Metric]:
        client, info = self._service.client, self._service.client.info
        stats = client.stats
        yield _gauge(
            "ready", "1 where /ready says so, 0 while the server loads, fails or drains.", not unready(self._service)
        )
        yield _gauge("num_requests_running", "Requests that hold a row.", stats.running)
        yield _gauge("num_requests_waiting", "Requests that wait for a row.", stats.waiting)
        unread = "Bytes of prompts that wait to be read or are being read."
        yield _gauge("prompt_backlog_bytes", unread, self._service.admission.unread)
        parked = [((str(stage),), count) for stage, count in enumerate(self._parked(), start=1)]
        text = "Requests whose row waits at the start of a chunk of the stage; part of those that run."
        yield _gauge_by("num_requests_parked", text, parked, ("stage",))
        yield _gauge("kv_cache_usage_perc", "Share of the KV positions in use, 0 to 1.", stats.kv_in_use)
        yield _gauge("state_slots_usage_perc", "Share of the rows in use, 0 to 1.", stats.rows_in_use)
        held = "Bytes of memory that kept prefixes take, beside the KV pages they share with rows."
        yield _gauge("prefix_cache_bytes", held, stats.prefix_cache_bytes)
        age = "Seconds since the engine was last heard of; it speaks at least once a second, work or none."
        yield _gauge("engine_heartbeat_age_seconds", age, client.heartbeat_age)
        for name, text, value in (
            ("graphs", "Steps captured as graphs on a GPU.", info.num_graphs if info else 0),
            ("graph_capture_seconds", "Seconds that capturing took.", info.capture_seconds if info else 0.0),
            ("graph_memory_bytes", "Bytes of the GPU's memory that graphs hold.", info.capture_bytes if info else 0),
        ):
            yield _gauge(name, text, value)
        if info is not None:
            about = {
                "model": self._service.model_name,
                "device": info.device,
                "dtype": info.dtype,
                "kernels": info.kernels,
                "stages": str(len(info.stages)),
                "max_model_len": str(info.max_model_len),
                "max_num_seqs": str(info.max_num_seqs),
            }
            family = GaugeMetricFamily("hnet_model_info", "The model served; always 1.", labels=list(about))
            family.add_metric(list(about.values()), 1)
            yield family

    def _parked(self) -> tuple[int, ...]:
        """Rows that wait for stage 1, 2, …: zeros before the engine's first word of it, and after its last."""
        client = self._service.client
        num_stages = len(client.info.stages) - 1 if client.info is not None else 0
        return client.stats.parked or (0,) * num_stages

    def _counters(self) -> Iterator[Metric]:
        metrics, totals = self._metrics, self._metrics.totals
        yield _counter(
            "prompt_bytes", "Bytes of prompts read by the model, BOS included.", [((), totals.prompt_bytes_total)]
        )
        yield _counter("generation_bytes", "Bytes generated.", [((), totals.generation_bytes_total)])
        chunks = [((str(stage),), count) for stage, count in enumerate(totals.chunks_total, start=1)]
        yield _counter("chunks", "Chunks opened: positions of a stage, stage 1 and up.", chunks, ("stage",))
        for name, text, count in (
            ("num_preemptions", "Times a request gave up its row for another one.", totals.preemptions_total),
            (
                "overlapped_ticks",
                "Ticks whose step a GPU was given before the bytes of the step before were read.",
                totals.overlapped_ticks_total,
            ),
            (
                "prefix_cache_queries_bytes",
                "Bytes of the prompts that were looked up in the prefix cache.",
                totals.prefix_cache_queries_bytes_total,
            ),
            (
                "prefix_cache_hits_bytes",
                "Bytes of prompts that came from the prefix cache and were not read again.",
                totals.prefix_cache_hits_bytes_total,
            ),
        ):
            yield _counter(name, text, [((), count)])
        for name, text, counts in (
            ("steps", "Pieces of work the engine ran.", metrics.steps),
            ("step_rows", "Rows (of a prefill: bytes) the pieces of work covered.", metrics.step_rows),
        ):
            by_step = [((kind, str(stage)), count) for (kind, stage), count in counts.items()]
            yield _counter(name, text, by_step, ("kind", "stage"))
        replays = [((kind, str(bucket), mode), count) for (kind, bucket, mode), count in metrics.graph_replays.items()]
        text = "Static steps run on a GPU, by the rows they are made for and whether they are captured graphs."
        yield _counter("graph_replays", text, replays, ("kind", "bucket", "mode"))
        finished = [((reason,), count) for reason, count in metrics.finished_by_reason.items()]
        text = "Requests ended, by reason; one request is one choice of one prompt. All accepted requests end up here."
        yield _counter("request_finished", text, finished, ("reason",))
        text = "Times an engine that had died or was silent for too long was started again."
        yield _counter("engine_restarts", text, [((), self._service.client.restarts)])
        # Each from 0 on: a rate needs a sample from before the first one.
        rejections = {**dict.fromkeys(REASONS, 0), **self._service.admission.rejections}
        rejected = [((reason,), count) for reason, count in rejections.items()]
        yield _counter("admission_rejections", "HTTP requests turned away at the gate.", rejected, ("reason",))

    def _histograms(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, text, histogram in (
            ("time_to_first_byte_seconds", "Seconds from submission to the first byte.", metrics.time_to_first_byte),
            ("inter_byte_latency_seconds", "Seconds between two bytes of a request.", metrics.inter_byte_latency),
            ("inter_chunk_latency_seconds", "Seconds between two chunks of a completion.", metrics.inter_chunk_latency),
            (
                "time_per_output_byte_seconds",
                "Seconds that a byte after the first took, the mean of a request.",
                metrics.time_per_output_byte,
            ),
            ("e2e_request_latency_seconds", "Seconds from submission to the end.", metrics.e2e_latency),
            ("request_queue_time_seconds", "Seconds from submission to a row.", metrics.queue_time),
            ("request_prefill_time_seconds", "Seconds from a row to the end of the prompt.", metrics.prefill_time),
            ("request_decode_time_seconds", "Seconds from the end of the prompt to the end.", metrics.decode_time),
            ("request_prompt_bytes", "Bytes of a prompt, BOS included.", metrics.prompt_bytes),
            ("request_generation_bytes", "Bytes of a completion.", metrics.generation_bytes),
        ):
            yield _histogram(name, text, [((), histogram)])
        per_chunk = [((str(stage),), histogram) for stage, histogram in metrics.bytes_per_chunk.items()]
        yield _histogram("bytes_per_chunk", "Bytes per chunk of a stage, request by request.", per_chunk, ("stage",))
        waits = [((str(stage),), histogram) for stage, histogram in sorted(metrics.park_wait.items())]
        yield _histogram("park_wait_seconds", "Seconds a row waited at the start of a chunk.", waits, ("stage",))
        steps = [((kind, str(stage)), histogram) for (kind, stage), histogram in metrics.step_duration.items()]
        yield _histogram("step_duration_seconds", "Seconds a piece of work took.", steps, ("kind", "stage"))


def _as_vllm(family: Metric, model: str) -> Metric:
    """The same numbers under vLLM's name, with its labels."""
    name = f"vllm:{VLLM[family.name.removeprefix('hnet_')]}"
    twin = Metric(name, f"{family.documentation} The same as {family.name}; a token is a byte.", family.type)
    for sample in family.samples:
        labels = {"finished_reason" if label == "reason" else label: value for label, value in sample.labels.items()}
        twin.add_sample(name + sample.name.removeprefix(family.name), {"model_name": model, **labels}, sample.value)
    return twin


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"hnet_{name}", text, value=value)


def _gauge_by(
    name: str, text: str, values: Iterable[tuple[tuple[str, ...], float]], labels: tuple[str, ...]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"hnet_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _counter(
    name: str, text: str, values: Iterable[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ()
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"hnet_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _histogram(
    name: str, text: str, values: Iterable[tuple[tuple[str, ...], Histogram]], labels: tuple[str, ...] = ()
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"hnet_{name}", text, labels=labels)
    for key, histogram in values:
        family.add_metric(key, histogram.cumulative(), histogram.sum)
    return family
