"""Settings of the application, and the manifests that hold some. Ray itself is in test_ray.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray", reason="needs the extra ray")

from server.cluster.application import ClusterSettings, build, split

DEPLOY = Path(__file__).parents[2] / "deploy" / "ray"


def test_what_is_not_the_clusters_is_an_option_of_hnet_serve() -> None:
    cluster, settings = split({"replicas": "3", "routing": "balanced", "model": "demo", "max_num_seqs": "8"})
    assert cluster == ClusterSettings(replicas=3, routing="balanced")
    assert (settings.model, settings.max_num_seqs) == ("demo", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"replicas": "many"}, "replicas: Input should be a valid integer"),
        ({"max_replicas": 2, "min_replicas": 3}, "max_replicas must be at least 1 and min_replicas"),
        ({"routing": "random"}, "routing: Input should be 'prefix' or 'balanced'"),
        ({"rows": 3}, "There is no setting rows"),
        ({"max_num_seqs": "few"}, "'few' is not a valid integer"),
        ({"prefill_share": 2}, "2.0 is not in the range"),
        ({"debug_checks": "perhaps"}, "debug_checks must be true or false"),
    ],
)
def test_wrong_settings_are_named_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        build(arguments)
    assert message in str(caught.value)


def test_lists_flags_and_sizes_are_as_one_types_them() -> None:
    asked = {"api_key": ["a", "b"], "debug_checks": True, "metrics_public": "false", "overlap": False}
    _, settings = split({**asked, "kv_memory": "1M"})
    assert settings.api_key == ("a", "b")
    assert settings.debug_checks
    assert settings.overlap is False
    assert not settings.metrics_public
    assert settings.kv_memory == 1 << 20


def test_the_manifests_settings_are_known() -> None:
    local = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    for config in (local, yaml.safe_load(service["spec"]["serveConfigV2"])):
        (application,) = config["applications"]
        assert application["import_path"] == "server.cluster.application:build"
        assert build(application["args"]) is not None


def test_a_cluster_of_the_manifest_is_valid_for_ray() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "serve.yaml").read_text()))
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
