"""docs/deploy.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from deploy.sizing import table

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_the_table_of_sizes_is_what_the_configurations_say() -> None:
    lines = list(table())
    assert len(lines) == 2 + 6
    assert "\n".join(lines) in DOCUMENT, "run: python -m deploy.sizing"


def test_every_alert_is_told() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"`(Hnet\w+)`", DOCUMENT))


def test_every_file_that_is_named_is_there() -> None:
    paths = set(re.findall(r"\b((?:deploy|docs|tests)/[\w./-]*\w)", DOCUMENT))
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_value_of_the_chart_that_is_named_is_there() -> None:
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "hnet-serve" / "values.yaml").read_text())
    named = set(
        re.findall(
            r"`((?:autoscaling|modelCache|apiKeys|networkPolicy|serviceMonitor|inferenceExtension)\.\w+)", DOCUMENT
        )
    )
    assert len(named) > 4
    for name in named:
        group, _, key = name.partition(".")
        assert key in values[group], name
