"""Grafana's dashboards as code: `python deploy/grafana/dashboards.py` writes them beside this file.

Knows the names of metrics; asks no server. Rates are over Grafana's own interval, which follows the scrape interval.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
CHOSEN = 'job=~"$job", instance=~"$instance"'
WIDTH, HEIGHT, ACROSS = 8, 8, 24  # of Grafana's grid


@dataclass(frozen=True)
class Panel:
    """A graph of some queries: (PromQL, legend)."""

    title: str
    description: str
    unit: str  # one of Grafana's
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels under their titles; `uid` is the file's name and the end of the address."""

    uid: str
    title: str
    rows: dict[str, tuple[Panel, ...]]


def gauge(name: str, by: str = "instance", aggregate: str = "sum") -> str:
    return f"{aggregate} by ({by}) (hnet_{name}{{{CHOSEN}}})"


def rate(name: str, by: str = "instance", where: str = "") -> str:
    chosen = f"{CHOSEN}, {where}" if where else CHOSEN
    return f"sum by ({by}) (rate(hnet_{name}{{{chosen}}}[$__rate_interval]))"


def ratio(part: str, whole: str, by: str = "instance", where: str = "") -> str:
    """Of two counters' rates; `where` restricts the first."""
    return f"{rate(part, by, where)} / {rate(whole, by)}"


def mean(histogram: str, by: str = "instance") -> str:
    return ratio(f"{histogram}_sum", f"{histogram}_count", by)


def quantiles(histogram: str, *others: str) -> tuple[tuple[str, str], ...]:
    """The 0.5, 0.9 and 0.99 quantiles of all servers together, for each value of the labels `others`."""
    buckets = rate(f"{histogram}_bucket", by=", ".join((*others, "le")))
    legend = "".join(f" {other} {{{{{other}}}}}" for other in others)
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}{legend}") for q in (0.5, 0.9, 0.99))


# The main network is the last stage, and each stage from 1 on has a gauge of its parked rows: their number is its name.
MAIN_STAGE = f'count_values by (job, instance) ("stage", {gauge("num_requests_parked", "job, instance", "count")})'
ROWS_PER_STAGE_STEP = ratio("step_rows_total", "steps_total", "job, instance, stage", 'kind="stage"')
RUNNING = gauge("num_requests_running", "job, instance")

SERVICE = Dashboard(
    "hnet-serve",
    "H-Net: service",
    {
        "State": (
            Panel(
                "Servers",
                "Targets that Prometheus can scrape, and those of them that are ready for requests.",
                "none",
                ((f"sum(up{{{CHOSEN}}})", "up"), (f"sum(hnet_ready{{{CHOSEN}}})", "ready")),
            ),
            Panel(
                "Engine's heartbeat",
                "Seconds since the engine was last heard of. Above 10 the server is not ready.",
                "s",
                ((gauge("engine_heartbeat_age_seconds", aggregate="max"), "{{instance}}"),),
            ),
            Panel(
                "Engine restarts",
                "In the last hour. The server's log has the reason.",
                "none",
                ((f"sum by (instance) (increase(hnet_engine_restarts_total{{{CHOSEN}}}[1h]))", "{{instance}}"),),
            ),
        ),
        "Traffic": (
            Panel(
                "Requests ended",
                "One request is one choice of one prompt.",
                "reqps",
                ((rate("request_finished_total", "reason"), "{{reason}}"),),
            ),
            Panel(
                "Bytes",
                "Prompts read and completions written.",
                "Bps",
                (
                    (rate("prompt_bytes_total"), "read {{instance}}"),
                    (rate("generation_bytes_total"), "written {{instance}}"),
                ),
            ),
            Panel(
                "Turned away",
                "HTTP requests refused at the gate: 429 or 503 with Retry-After.",
                "reqps",
                ((rate("admission_rejections_total", "reason"), "{{reason}}"),),
            ),
            Panel(
                "Requests in the server",
                "Those that hold a row, and those that wait for one.",
                "none",
                (
                    (gauge("num_requests_running"), "running {{instance}}"),
                    (gauge("num_requests_waiting"), "waiting {{instance}}"),
                ),
            ),
            Panel(
                "Prompt backlog",
                "Bytes of prompts that wait to be read or are being read.",
                "bytes",
                ((gauge("prompt_backlog_bytes"), "{{instance}}"),),
            ),
            Panel(
                "Share of errors",
                "Requests that ended with an error, of all that ended.",
                "percentunit",
                (
                    (
                        ratio("request_finished_total", "request_finished_total", where='reason="error"'),
                        "{{instance}}",
                    ),
                ),
            ),
        ),
        "Latency": (
            Panel("First byte", "From submission.", "s", quantiles("time_to_first_byte_seconds")),
            Panel("Between bytes", "As they reach the server.", "s", quantiles("inter_byte_latency_seconds")),
            Panel("Whole request", "From submission to its end.", "s", quantiles("e2e_request_latency_seconds")),
            Panel("Queue", "From submission to a row.", "s", quantiles("request_queue_time_seconds")),
            Panel("Prompt", "From a row to the end of the prompt.", "s", quantiles("request_prefill_time_seconds")),
            Panel(
                "Completion", "From the end of the prompt to the end.", "s", quantiles("request_decode_time_seconds")
            ),
        ),
        "Memory": (
            Panel(
                "In use",
                "Shares of KV positions and of rows.",
                "percentunit",
                (
                    (gauge("kv_cache_usage_perc"), "KV {{instance}}"),
                    (gauge("state_slots_usage_perc"), "rows {{instance}}"),
                ),
            ),
            Panel(
                "Preemptions",
                "Times a request gave up its row for another one: with KV in full use, memory is short.",
                "ops",
                ((rate("num_preemptions_total"), "{{instance}}"),),
            ),
            Panel(
                "Prefix cache",
                "Share of the bytes looked up that were not read again.",
                "percentunit",
                (
                    (
                        ratio("prefix_cache_hits_bytes_total", "prefix_cache_queries_bytes_total"),
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                "Kept prefixes",
                "Memory beside the KV pages that they share with rows.",
                "bytes",
                ((gauge("prefix_cache_bytes"), "{{instance}}"),),
            ),
        ),
    },
)

ENGINE = Dashboard(
    "hnet-engine",
    "H-Net: chunks and steps",
    {
        "Chunks": (
            Panel("Chunks", "Opened, by stage.", "ops", ((rate("chunks_total", "stage"), "stage {{stage}}"),)),
            Panel(
                "Bytes per chunk",
                "The mean of requests. Near 1, odd input makes every byte a chunk.",
                "none",
                ((mean("bytes_per_chunk", "stage"), "stage {{stage}}"),),
            ),
            Panel("Between chunks", "Of one completion.", "s", quantiles("inter_chunk_latency_seconds")),
        ),
        "Batching": (
            Panel(
                "Rows per step",
                "Reading weights is most of a step: more rows share it.",
                "none",
                (
                    (
                        ratio("step_rows_total", "steps_total", "kind, stage"),
                        "{{kind}} {{stage}}",
                    ),
                ),
            ),
            Panel(
                "How full the main network's steps are",
                "Rows of its mean step as a share of the rows that run. Low where rows do not wait for each other.",
                "percentunit",
                (
                    (
                        f"{ROWS_PER_STAGE_STEP} / on (job, instance) group_left () {RUNNING} and {MAIN_STAGE}",
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                "Parked rows",
                "Waiting at the start of a chunk.",
                "none",
                ((gauge("num_requests_parked", "stage"), "stage {{stage}}"),),
            ),
            Panel("Waits at a chunk", "Of parked rows.", "s", quantiles("park_wait_seconds", "stage")),
        ),
        "Steps": (
            Panel("Steps", "By kind and stage.", "ops", ((rate("steps_total", "kind, stage"), "{{kind}} {{stage}}"),)),
            Panel(
                "Duration",
                "The mean of a step.",
                "s",
                ((mean("step_duration_seconds", "kind, stage"), "{{kind}} {{stage}}"),),
            ),
            Panel(
                "Where the time goes",
                "Seconds a second spent in each kind of step.",
                "percentunit",
                ((rate("step_duration_seconds_sum", "kind, stage"), "{{kind}} {{stage}}"),),
            ),
        ),
        "Captured steps, on a GPU": (
            Panel(
                "Static steps",
                "By the rows they are made for, and whether they are captured graphs or run operation by operation.",
                "ops",
                ((rate("graph_replays_total", "kind, bucket, mode"), "{{kind}} {{bucket}} {{mode}}"),),
            ),
            Panel(
                "Overlapped ticks",
                "Whose step the GPU was given before the bytes of the step before were read.",
                "ops",
                ((rate("overlapped_ticks_total"), "{{instance}}"),),
            ),
            Panel("Graphs", "Captured when the engine started.", "none", ((gauge("graphs"), "{{instance}}"),)),
            Panel(
                "What capturing took",
                "Seconds, and memory that the graphs hold.",
                "none",
                (
                    (gauge("graph_capture_seconds"), "seconds {{instance}}"),
                    (gauge("graph_memory_bytes"), "bytes {{instance}}"),
                ),
            ),
        ),
        "Requests": (
            Panel("Prompts", "BOS included.", "bytes", quantiles("request_prompt_bytes")),
            Panel("Completions", "As far as they came.", "bytes", quantiles("request_generation_bytes")),
            Panel(
                "Seconds per byte",
                "The mean of a request after its first byte.",
                "s",
                quantiles("time_per_output_byte_seconds"),
            ),
        ),
    },
)

DASHBOARDS = (SERVICE, ENGINE)


def as_json(dashboard: Dashboard) -> str:
    """A dashboard in Grafana's own form."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows.items():
        panels.append(_row(title, y))
        for index, panel in enumerate(row):
            x, below = index * WIDTH % ACROSS, index * WIDTH // ACROSS
            panels.append(_graph(panel, x, y + 1 + below * HEIGHT))
        y += 1 + -(-len(row) * WIDTH // ACROSS) * HEIGHT
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["hnet"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_variable("job"), _variable("instance")]},
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"


def _row(title: str, y: int) -> dict[str, Any]:
    return {
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"x": 0, "y": y, "w": ACROSS, "h": 1},
    }


def _graph(panel: Panel, x: int, y: int) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _variable(label: str) -> dict[str, Any]:
    """A choice of a label's values; none chosen is all of them."""
    return {
        "type": "query",
        "name": label,
        "label": label,
        "datasource": DATASOURCE,
        "query": f"label_values(hnet_engine_heartbeat_age_seconds, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    for each in DASHBOARDS:
        (HERE / f"{each.uid}.json").write_text(as_json(each), encoding="utf-8")
