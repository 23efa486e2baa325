"""deploy/compose: its parts find each other, and every variable it sets is one that the server knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cli.serve import serve

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = DEPLOY / "compose"
SERVICES: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]


def mounts(service: str) -> dict[str, str]:
    """Inside → outside."""
    pairs = (volume.split(":")[:2] for volume in SERVICES[service]["volumes"])
    return {inside: outside for outside, inside in pairs}


def test_every_file_and_folder_that_is_mounted_is_there() -> None:
    volumes = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["volumes"]
    for service in SERVICES:
        for outside in mounts(service).values():
            assert (COMPOSE / outside).exists() if outside.startswith(".") else outside in volumes


def test_prometheus_reads_its_configuration_and_scrapes_the_server() -> None:
    (flag,) = (each for each in SERVICES["prometheus"]["command"] if each.startswith("--config.file="))
    inside = Path(flag.partition("=")[2])
    path = COMPOSE / mounts("prometheus")[str(inside.parent)] / inside.name
    config = yaml.safe_load(path.read_text())
    assert all((path.parent / each).is_file() for each in config["rule_files"])
    ((target,),) = (each["targets"] for each in config["scrape_configs"][0]["static_configs"])
    host, _, port = target.partition(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_grafana_finds_prometheus_and_the_dashboards_find_their_source() -> None:
    (source,) = yaml.safe_load((COMPOSE / "grafana" / "datasources.yaml").read_text())["datasources"]
    host = re.fullmatch(r"http://([a-z-]+):9090", source["url"])
    assert host is not None
    assert host[1] in SERVICES
    (provider,) = yaml.safe_load((COMPOSE / "grafana" / "dashboards.yaml").read_text())["providers"]
    folder = COMPOSE / mounts("grafana")[provider["options"]["path"]]
    dashboards = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    used = {
        target["datasource"]["uid"]
        for each in dashboards
        for panel in each["panels"]
        for target in panel.get("targets", ())
    }
    assert used == {source["uid"]}
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).is_file()


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_the_image_is_one_that_the_dockerfile_makes(name: str) -> None:
    build = yaml.safe_load((COMPOSE / name).read_text())["services"]["hnet-serve"]["build"]
    dockerfile = (COMPOSE / build["context"] / "Dockerfile").read_text()
    assert re.search(rf"^FROM .* AS {build['target']}$", dockerfile, re.MULTILINE)


def test_the_server_is_told_nothing_that_it_does_not_know() -> None:
    known = {str(parameter.envvar) for parameter in serve.params}
    environment = SERVICES["hnet-serve"]["environment"]
    assert set(environment) <= known
    grace = int(SERVICES["hnet-serve"]["stop_grace_period"].removesuffix("s"))
    assert grace >= int(environment["HNET_DRAIN_TIMEOUT"]) + 10
