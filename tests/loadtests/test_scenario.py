"""Scenarios: data that is checked, and requests that are the same each time."""

from __future__ import annotations

import random
import re
from pathlib import Path
from statistics import mean

import pytest

from loadtests import scenario as scenarios
from loadtests.scenario import Arrivals, Scenario

SMALL = """
name = "small"
description = "One kind."
rates = [1.0, 2.0]
seconds = 5.0

[objective]
first_byte = 1.0
gap = 1.0
share = 0.95

[[requests]]
name = "short"
prompt_bytes = { least = 4, most = 8 }
max_tokens = { least = 1, most = 4 }
"""


def parse(tmp_path: Path, text: str) -> Scenario:
    path = tmp_path / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return scenarios.load(str(path))


@pytest.mark.parametrize("name", scenarios.names())
def test_every_scenario_of_the_project_can_be_asked(name: str) -> None:
    scenario = scenarios.load(name)
    assert scenario.name == name
    seen = set()
    for variant in range(100):
        asked = scenario.request(variant)
        kind = scenario.kind(asked.kind)
        seen.add(asked.kind)
        assert asked == scenario.request(variant)
        body = asked.body(salt="s")
        assert body["stream"] is True
        assert kind.max_tokens.least <= body["max_tokens"] <= kind.max_tokens.most
        said = body["prompt"] if "prompt" in body else "".join(message["content"] for message in body["messages"])
        assert len(said.encode()) - kind.shared_bytes >= kind.prompt_bytes.least
        assert len(said.encode()) - kind.shared_bytes <= kind.prompt_bytes.most
        assert set(asked.body(peer="m")) <= {*body, "model"} - {"cache_salt", "allowed_token_ids", "ignore_eos"}
    assert seen == {kind.name for kind in scenario.requests}


def test_prompts_that_share_begin_alike_and_no_salt_parts_them() -> None:
    scenario = scenarios.load("shared-prefix")
    first, second = (scenario.request(variant).body(salt="s") for variant in (1, 2))
    assert first["prompt"] != second["prompt"]
    assert first["prompt"][:1500] == second["prompt"][:1500]
    assert "cache_salt" not in first
    assert scenarios.load("long-prompt").request(1).body(salt="s")["cache_salt"] == "s"


def test_a_chat_ends_with_its_user() -> None:
    scenario = scenarios.load("chat")
    for variant in range(20):
        asked = scenario.request(variant)
        roles = [message["role"] for message in asked.body()["messages"]]
        turns = scenario.kind(asked.kind).turns
        assert roles == ["system", *["user", "assistant"] * (turns - 1), "user"]


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        ("rates = [2.0, 1.0]", "rates = [1.0, 2.0]", "have to rise"),
        ("rates = []", "rates = [1.0, 2.0]", "rates"),
        ("seconds = 1e9", "seconds = 5.0", "seconds"),
        ("seconds = 5.0\nwarm_up = 5.0", "seconds = 5.0", "nothing to count"),
        ("seconds = 5.0\nusers = 3", "seconds = 5.0", "users"),
        ("least = 9, most = 8", "least = 4, most = 8", "more than most"),
        ("share = 1.5", "share = 0.95", "share"),
        ('name = "short"\nturns = 2', 'name = "short"', "only a chat"),
        ('seconds = 5.0\narrivals = { kind = "bursts" }', "seconds = 5.0", "size"),
        ('seconds = "5"', "seconds = 5.0", "seconds"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(tmp_path: Path, wrong: str, right: str, said: str) -> None:
    assert parse(tmp_path, SMALL).seconds == 5
    with pytest.raises(ValueError, match=said):
        parse(tmp_path, SMALL.replace(right, wrong))


def test_two_kinds_have_two_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        parse(tmp_path, SMALL + SMALL[SMALL.index("[[requests]]") :])


def test_an_unknown_scenario_is_told_those_that_exist() -> None:
    with pytest.raises(ValueError, match="chat"):
        scenarios.load("nothing-of-the-kind")


def test_changes_are_checked_too(tmp_path: Path) -> None:
    scenario = parse(tmp_path, SMALL)
    assert scenario.with_changes(rates=(4.0,), seconds=None).rates == (4.0,)
    with pytest.raises(ValueError, match="rise"):
        scenario.with_changes(rates=(4.0, 2.0))


@pytest.mark.parametrize("arrivals", [Arrivals(), Arrivals(kind="steady"), Arrivals(kind="bursts", size=8)])
def test_arrivals_have_the_rate_that_is_asked_for(arrivals: Arrivals) -> None:
    rng = random.Random(1)
    intervals = [arrivals.interval(4.0, rng) for _ in range(4000)]
    assert arrivals.size / mean(intervals) == pytest.approx(4.0, rel=0.05)
    assert (len(set(intervals)) == 1) == (arrivals.kind == "steady")
    assert all(arrivals.first(4.0, rng) >= 0 for _ in range(100))


def test_the_scenarios_of_the_documentation_are_those_that_are(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "loadtests.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == set(scenarios.names())
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert parse(tmp_path, example).requests[0].abort_share == 0.25
