"""Dashboards, alert rules and the scrape configuration, held against what the server really shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from deploy.grafana.dashboards import ACROSS, DASHBOARDS, HERE, Dashboard, as_json
from tests.deploy.promql import metrics

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
ALERTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = [panel for dashboard in DASHBOARDS for row in dashboard.rows.values() for panel in row]
QUERIES = [expression for panel in PANELS for expression, _ in panel.queries]
ADDED_BY_PROMETHEUS = {"job", "instance"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is Prometheus's own: not installed"
)


def shown(exposition: dict[str, Metric], name: str) -> set[str] | None:
    """The labels of a sample of this name; None where the server has none."""
    labels = [set(sample.labels) for family in exposition.values() for sample in family.samples if sample.name == name]
    return set.union(*labels) if labels else None


@pytest.mark.parametrize("expression", [*QUERIES, *(alert["expr"] for alert in ALERTS)])
def test_every_metric_and_label_that_is_asked_for_is_the_servers(
    expression: str, exposition: dict[str, Metric]
) -> None:
    asked = list(metrics(expression.replace("$__rate_interval", "1m")))
    assert asked
    for name, labels in asked:
        known = set() if name == "up" else shown(exposition, name)
        assert known is not None, f"the server has no {name}"
        assert labels <= known | ADDED_BY_PROMETHEUS, name


def test_a_metric_or_a_label_that_the_server_does_not_have_is_found(exposition: dict[str, Metric]) -> None:
    ((name, labels),) = metrics('sum by (stage) (rate(hnet_num_requests_running{kind="byte"}[1m]))')
    assert labels == {"stage", "kind"}
    assert shown(exposition, name) == set()
    assert shown(exposition, "hnet_num_requests_thinking") is None


def test_a_dashboard_shows_nearly_all_that_the_server_tells(exposition: dict[str, Metric]) -> None:
    asked = {name for expression in QUERIES for name, _ in metrics(expression.replace("$__rate_interval", "1m"))}
    families = {name for name, family in exposition.items() if any(each.name in asked for each in family.samples)}
    assert set(exposition) - families == {"hnet_model_info"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_the_committed_dashboard_is_what_the_code_makes(dashboard: Dashboard) -> None:
    committed = (HERE / f"{dashboard.uid}.json").read_text(encoding="utf-8")
    assert committed == as_json(dashboard), "run: python deploy/grafana/dashboards.py"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_lie_beside_and_below_each_other(dashboard: Dashboard) -> None:
    panels = json.loads(as_json(dashboard))["panels"]
    cells: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells
        assert all(x < ACROSS for x, _ in own)
        cells |= own
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_alert_says_how_bad_it_is_and_whom_it_concerns() -> None:
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("info", "warning", "critical"), alert["alert"]
        assert "{{ $labels.instance }}" in alert["annotations"]["summary"], alert["alert"]


def test_every_alert_is_shown_firing_and_not_firing() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    instances = {
        case["alertname"]: {each["exp_labels"]["instance"] for each in case["exp_alerts"]}
        for test in tests
        for case in test["alert_rule_test"]
    }
    assert fired == {alert["alert"] for alert in ALERTS}
    assert not any("good" in named for named in instances.values())
    assert all(any('instance="good"' in each["series"] for each in test["input_series"]) for test in tests)


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yaml"), ("check", "config", "prometheus.yaml"), ("test", "rules", "alerts_test.yaml")],
)
def test_promtool_is_content(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
