from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from answers import samples, wait_for
from conftest import Running
from fake_engine import PARK_SECONDS
from prometheus_client.parser import text_string_to_metric_families

from server.exposition import VLLM
from server.metrics import Histogram

# Every family of `docs/api.md`, with the first word of its help, which is its unit.
UNITS = {
    "num_requests_running": "Requests",
    "num_requests_waiting": "Requests",
    "num_requests_parked": "Requests",
    "prompt_backlog_bytes": "Bytes",
    "kv_cache_usage_perc": "Share",
    "state_slots_usage_perc": "Share",
    "prefix_cache_bytes": "Bytes",
    "engine_heartbeat_age_seconds": "Seconds",
    "ready": "1 where /ready says so",
    "model_info": "The model served; always 1.",
    "prompt_bytes": "Bytes",
    "generation_bytes": "Bytes",
    "chunks": "Chunks",
    "num_preemptions": "Times",
    "overlapped_ticks": "Ticks",
    "prefix_cache_queries_bytes": "Bytes",
    "prefix_cache_hits_bytes": "Bytes",
    "steps": "Pieces of work",
    "step_rows": "Rows",
    "graphs": "Steps captured",
    "graph_capture_seconds": "Seconds",
    "graph_memory_bytes": "Bytes",
    "graph_replays": "Static steps",
    "request_finished": "Requests",
    "engine_restarts": "Times",
    "admission_rejections": "HTTP requests",
    "time_to_first_byte_seconds": "Seconds",
    "inter_byte_latency_seconds": "Seconds",
    "inter_chunk_latency_seconds": "Seconds",
    "time_per_output_byte_seconds": "Seconds",
    "e2e_request_latency_seconds": "Seconds",
    "request_queue_time_seconds": "Seconds",
    "request_prefill_time_seconds": "Seconds",
    "request_decode_time_seconds": "Seconds",
    "request_prompt_bytes": "Bytes",
    "request_generation_bytes": "Bytes",
    "bytes_per_chunk": "Bytes",
    "park_wait_seconds": "Seconds",
    "step_duration_seconds": "Seconds",
}
# What dashboards and autoscalers made for vLLM ask for.
VLLM_SAMPLES = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:request_success_total"),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
    *("vllm:request_time_per_output_token_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket"),
    *("vllm:e2e_request_latency_seconds_sum", "vllm:e2e_request_latency_seconds_count"),
    *("vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum"),
    *("vllm:request_decode_time_seconds_sum", "vllm:request_prompt_tokens_bucket"),
    "vllm:request_generation_tokens_bucket",
}


def test_all_that_was_asked_is_counted(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread(max_num_seqs=2).client() as client:
        for body in (
            {"prompt": "abc", "max_tokens": 10},
            {"prompt": ["abc", "de!nan"], "n": 2, "max_tokens": 6, "temperature": 0},
            {"prompt": "ab!eos", "stream": True, "temperature": 0},
            {"prompt": "!refuse"},
        ):
            assert client.post("/v1/completions", json=body).status_code == 200
        client.post("/v1/segment", json={"input": "abcdefgh"})
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {family.name.removeprefix("hnet_") for family in text_string_to_metric_families(answer.text)} == set(UNITS)
    values = samples(answer.text)
    finished = {reason: values[f'hnet_request_finished_total{{reason="{reason}"}}'] for reason in REASONS}
    assert finished == {"stop": 1, "length": 4, "abort": 0, "error": 3}
    assert sum(finished.values()) == 1 + 4 + 1 + 1 + 1  # every request that was accepted, choice by choice
    assert values["hnet_generation_bytes_total"] == 10 + 2 * 6 + 2 * 3 + 5
    assert values["hnet_prompt_bytes_total"] == 4 + 2 * 4 + 2 * 7 + 7 + 9
    assert values["hnet_e2e_request_latency_seconds_count"] == 8
    assert values["hnet_request_generation_bytes_sum"] == 10 + 2 * 6 + 2 * 3 + 5
    assert values["hnet_time_to_first_byte_seconds_count"] == 6
    assert values["hnet_inter_byte_latency_seconds_count"] == 9 + 2 * 5 + 2 * 2 + 4
    # Chunks open every 3 bytes: of the first request's 9 bytes that were fed again three opened one.
    assert values["hnet_inter_chunk_latency_seconds_count"] == 2
    assert values["hnet_num_requests_running"] == values["hnet_num_requests_waiting"] == 0
    steps = values['hnet_steps_total{kind="byte",stage="0"}']
    assert values['hnet_step_duration_seconds_count{kind="byte",stage="0"}'] == steps > 0
    assert values['hnet_step_rows_total{kind="byte",stage="0"}'] >= steps
    assert values['hnet_bytes_per_chunk_count{stage="2"}'] == 7


def test_waits_for_a_stage_are_shown_while_they_last_and_measured_when_they_end(
    serve_in_thread: Callable[..., Running],
) -> None:
    running = serve_in_thread(tick_seconds=0.01)
    seen: set[tuple[float, float]] = set()

    def parked(client: httpx.Client) -> tuple[float, float]:
        values = samples(client.get("/metrics").text)
        return values[PARKED.format(1)], values[PARKED.format(2)]

    with running.client() as client, running.client() as other:
        assert parked(client) == (0, 0)  # every stage is there before anything waits
        body = {"prompt": ["a!park", "b!park", "c"], "max_tokens": 4, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            wait_for(lambda: seen.add(parked(other)) or {(2, 0), (0, 2)} <= seen)
            answer.read()
        values = samples(client.get("/metrics").text)
        assert parked(client) == (0, 0)
    for stage, seconds in enumerate(PARK_SECONDS, start=1):
        assert values[f'hnet_park_wait_seconds_count{{stage="{stage}"}}'] == 2
        assert values[f'hnet_park_wait_seconds_sum{{stage="{stage}"}}'] == 2 * seconds


def test_totals_of_the_prefix_cache_and_of_preemptions_outlive_an_engine(
    serve_in_thread: Callable[..., Running],
) -> None:
    with serve_in_thread(prefix_cache=True).client() as client:
        for prompt in ("abcdef", "abcxyz", "a!preempt"):
            client.post("/v1/completions", json={"prompt": prompt})
        before = samples(client.get("/metrics").text)
        assert client.post("/v1/completions", json={"prompt": "!crash"}).status_code == 500
        after = samples(client.get("/metrics").text)
    counted = {
        "hnet_prefix_cache_queries_bytes_total": 7 + 7 + 10,
        "hnet_prefix_cache_hits_bytes_total": 4 + 2,
        "hnet_num_preemptions_total": 2,
    }
    for name, count in counted.items():
        assert before[name] == count
        assert after[name] >= count
    assert (before["hnet_prefix_cache_bytes"], after["hnet_prefix_cache_bytes"]) == (24, 0)


def test_help_says_the_unit(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread().client() as client:
        families = {each.name: each for each in text_string_to_metric_families(client.get("/metrics").text)}
    for name, unit in UNITS.items():
        assert families[f"hnet_{name}"].documentation.startswith(unit), name


def test_the_document_has_every_name() -> None:
    document = (
        (Path(__file__).parents[2] / "docs/api.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    )
    told = {
        name.partition("{")[0].removesuffix("_total") for name in re.findall(r"`([a-z0-9_]+(?:{[^`]*)?)`", document)
    }
    assert set(UNITS) <= told


PARKED = 'hnet_num_requests_parked{{stage="{}"}}'
REASONS = ("stop", "length", "abort", "error")


def test_buckets_begin_at_a_tenth_of_a_millisecond(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread().client() as client:
        values = samples(client.get("/metrics").text)
    assert 'hnet_inter_byte_latency_seconds_bucket{le="0.0001"}' in values


def test_model_info_says_what_runs_the_model(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread().client() as client:
        families = {each.name: each for each in text_string_to_metric_families(client.get("/metrics").text)}
    (info,) = families["hnet_model_info"].samples
    assert (info.labels["device"], info.labels["dtype"], info.labels["kernels"]) == ("cpu", "float32", "torch")


def test_vllms_names_have_the_same_numbers_when_asked_for(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread(settings={"metrics_compat": "vllm"}).client() as client:
        client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 10})
        text = client.get("/metrics").text
    told = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    compat = [sample for sample in told if sample.name.startswith("vllm:")]
    assert {sample.name for sample in compat} >= VLLM_SAMPLES
    assert all(sample.labels["model_name"] == "fake" for sample in compat)
    values = samples(text)
    assert values['vllm:generation_tokens_total{model_name="fake"}'] == values["hnet_generation_bytes_total"] == 10
    assert values['vllm:request_success_total{finished_reason="length",model_name="fake"}'] == 1
    for ours, theirs in VLLM.items():
        (family,) = (each for each in text_string_to_metric_families(text) if each.name == f"vllm:{theirs}")
        assert f"The same as hnet_{ours};" in family.documentation


def test_without_being_asked_for_vllms_names_are_not_there(http: httpx.Client) -> None:
    assert "vllm:" not in http.get("/metrics").text


def test_a_histogram_counts_a_value_in_the_bucket_that_bounds_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, weight in ((0.5, 1), (1.0, 1), (1.5, 3), (9.0, 1)):
        histogram.observe(value, weight)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 5.0), ("+Inf", 6.0)]
    assert histogram.sum == pytest.approx(0.5 + 1.0 + 4.5 + 9.0)
