from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from answers import samples, wait_for
from conftest import Running
from fake_engine import PARK_SECONDS
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Histogram

NAMES = {
    "hnet_num_requests_running",
    "hnet_num_requests_waiting",
    "hnet_prompt_backlog_bytes",
    "hnet_num_requests_parked",
    "hnet_num_preemptions",
    "hnet_prefix_cache_queries_bytes",
    "hnet_prefix_cache_hits_bytes",
    "hnet_prefix_cache_bytes",
    "hnet_park_wait_seconds",
    "hnet_kv_cache_usage_perc",
    "hnet_state_slots_usage_perc",
    "hnet_engine_heartbeat_age_seconds",
    "hnet_model_info",
    "hnet_prompt_bytes",
    "hnet_generation_bytes",
    "hnet_chunks",
    "hnet_steps",
    "hnet_step_rows",
    "hnet_request_finished",
    "hnet_engine_restarts",
    "hnet_admission_rejections",
    "hnet_time_to_first_byte_seconds",
    "hnet_inter_byte_latency_seconds",
    "hnet_inter_chunk_latency_seconds",
    "hnet_time_per_output_byte_seconds",
    "hnet_e2e_request_latency_seconds",
    "hnet_request_queue_time_seconds",
    "hnet_request_prefill_time_seconds",
    "hnet_request_prompt_bytes",
    "hnet_request_generation_bytes",
    "hnet_bytes_per_chunk",
    "hnet_step_duration_seconds",
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
    assert {family.name for family in text_string_to_metric_families(answer.text)} == NAMES
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
    for name, unit in (
        ("hnet_num_requests_parked", "Requests"),
        ("hnet_num_preemptions", "Times"),
        ("hnet_prefix_cache_queries_bytes", "Bytes"),
        ("hnet_prefix_cache_hits_bytes", "Bytes"),
        ("hnet_prefix_cache_bytes", "Bytes"),
        ("hnet_prompt_backlog_bytes", "Bytes"),
        ("hnet_park_wait_seconds", "Seconds"),
        ("hnet_engine_restarts", "Times"),
    ):
        assert families[name].documentation.startswith(unit)


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


def test_the_names_of_another_server_are_there_when_asked_for(serve_in_thread: Callable[..., Running]) -> None:
    compat = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
    with serve_in_thread(settings={"metrics_compat": "vllm"}).client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        assert {family.name for family in families if family.name.startswith("vllm:")} == compat


def test_a_histogram_counts_a_value_in_the_bucket_that_bounds_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, weight in ((0.5, 1), (1.0, 1), (1.5, 3), (9.0, 1)):
        histogram.observe(value, weight)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 5.0), ("+Inf", 6.0)]
    assert histogram.sum == pytest.approx(0.5 + 1.0 + 4.5 + 9.0)
