"""The chart, rendered by Helm itself; its manifests by Kubernetes's own schemas and against the server's promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import Metric

from server.cli.serve import serve
from server.exposition import VLLM
from tests.deploy.promql import metrics

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "hnet-serve"
SHARED = {"accessModes": ["ReadWriteMany"]}
KEDA = {"kind": "keda"}
RENDERED: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": yaml.safe_load((CHART / "values-cuda.yaml").read_text()),
    "hpa": {"autoscaling": {"kind": "hpa"}, "modelCache": SHARED, "apiKeys": {"existingSecret": "clients"}},
    "everything": {
        "model": "cartesia-ai/hnet_1stage_L",
        "options": {"MAX_NUM_SEQS": "16", "BATCHING": "aligned"},
        "drainTimeout": 120,
        "replicas": 3,
        "apiKeys": {"keys": ["one", "two"]},
        "hubTokenSecret": "hub",
        "modelCache": {**SHARED, "storageClass": "fast"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "autoscaling": KEDA,
        "networkPolicy": {"from": [{"namespaceSelector": {}}], "egress": [{"ports": [{"port": 4318}]}]},
        "inferenceExtension": {"enabled": True, "poolLabels": {"pool": "hnet"}},
        "imagePullSecrets": [{"name": "registry"}],
        "podAnnotations": {"note": "on"},
        "nodeSelector": {"disk": "fast"},
    },
    "bare": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "modelCache": {"enabled": False},
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "several replicas need": {"replicas": 2},
    "several replicas": {"autoscaling": KEDA},
    "additional properties 'replica'": {"replica": 2},
    "propertyName": {"options": {"max-num-seqs": "2"}},
    "/autoscaling/kind": {"autoscaling": {"kind": "vpa"}},
}


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """Of `helm lint`, then of each of RENDERED and of REFUSED."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("render.py")), str(CHART)],
        input=json.dumps([*RENDERED.values(), *REFUSED.values()]),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def releases(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Manifests by kind, for each of RENDERED."""
    found: dict[str, dict[str, Any]] = {}
    for name, answer in zip(RENDERED, answers[1:], strict=False):
        assert "manifests" in answer, answer
        texts = (text for path, text in answer["manifests"].items() if path.endswith(".yaml"))
        documents = [document for text in texts for document in yaml.safe_load_all(text) if document]
        found[name] = {document["kind"]: document for document in documents}
        assert len(found[name]) == len(documents), "two manifests of a kind: tell them apart"
    return found


def container(release: dict[str, Any]) -> dict[str, Any]:
    (only,) = release["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(release: dict[str, Any]) -> dict[str, str | None]:
    return {each["name"]: each.get("value") for each in container(release)["env"]}


def test_helm_finds_no_fault(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["errors"] == []
    assert [each["error"] for each in answers[0]["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize(("name", "version"), [*((name, "1.37") for name in RENDERED), ("everything", "1.28")])
def test_kubernetes_takes_every_manifest(name: str, version: str, releases: dict[str, dict[str, Any]]) -> None:
    custom = {"ServiceMonitor", "ScaledObject"}  # of operators, which have schemas of their own
    validated = [kind for kind in releases[name] if kind not in custom]
    for kind in validated:
        kubernetes_validate.validate(releases[name][kind], version, strict=True)
    assert {"Deployment", "Service"} <= set(validated)


def test_the_validation_sees_a_misspelt_field(releases: dict[str, dict[str, Any]]) -> None:
    broken = json.loads(json.dumps(releases["cpu"]["Deployment"]))
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def test_every_kind_that_was_asked_for_is_there(releases: dict[str, dict[str, Any]]) -> None:
    always = {"Deployment", "Service"}
    usual = {*always, "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy"}
    assert set(releases["bare"]) == always
    assert set(releases["cpu"]) == set(releases["cuda"]) == usual
    assert set(releases["hpa"]) == {*usual, "HorizontalPodAutoscaler"}
    assert set(releases["everything"]) == {*usual, "Secret", "ServiceMonitor", "ScaledObject"}


@pytest.mark.parametrize("message", REFUSED)
def test_values_that_cannot_work_are_refused_in_words(message: str, answers: list[dict[str, Any]]) -> None:
    answer = answers[1 + len(RENDERED) + list(REFUSED).index(message)]
    assert message in answer["error"]


@pytest.mark.parametrize("name", RENDERED)
def test_a_pod_has_longer_than_its_drain(name: str, releases: dict[str, dict[str, Any]]) -> None:
    grace = releases[name]["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    waits = int(container(releases[name])["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = environment(releases[name])["HNET_DRAIN_TIMEOUT"]
    assert drain == str(RENDERED[name].get("drainTimeout", 30))
    assert grace >= waits + int(drain) + 10


@pytest.mark.parametrize("name", RENDERED)
def test_probes_ask_what_they_should(name: str, releases: dict[str, dict[str, Any]]) -> None:
    probes = {kind: probe["httpGet"] for kind, probe in container(releases[name]).items() if kind.endswith("Probe")}
    assert {kind: get["path"] for kind, get in probes.items()} == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }
    (port,) = container(releases[name])["ports"]
    assert {get["port"] for get in probes.values()} == {port["name"]}
    assert environment(releases[name])["HNET_PORT"] == str(port["containerPort"])


@pytest.mark.parametrize("name", RENDERED)
def test_the_server_knows_every_variable(name: str, releases: dict[str, dict[str, Any]]) -> None:
    known = {str(parameter.envvar) for parameter in serve.params} | {"HF_TOKEN"}
    assert set(environment(releases[name])) <= known


@pytest.mark.parametrize("name", RENDERED)
def test_what_selects_pods_selects_these(name: str, releases: dict[str, dict[str, Any]]) -> None:
    release = releases[name]
    labels = release["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [release["Deployment"]["spec"]["selector"]["matchLabels"], release["Service"]["spec"]["selector"]]
    selectors += [
        release[kind]["spec"]["selector"]["matchLabels"] for kind in ("PodDisruptionBudget",) if kind in release
    ]
    if "NetworkPolicy" in release:
        selectors.append(release["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    assert all(selector and selector.items() <= labels.items() for selector in selectors)


@pytest.mark.parametrize("name", RENDERED)
def test_pods_are_nobody_and_write_only_to_their_volumes(name: str, releases: dict[str, dict[str, Any]]) -> None:
    pod = releases[name]["Deployment"]["spec"]["template"]["spec"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n" in dockerfile
    assert pod["securityContext"]["runAsNonRoot"]
    assert container(releases[name])["securityContext"]["readOnlyRootFilesystem"]
    mounted = {each["mountPath"] for each in container(releases[name])["volumeMounts"]}
    assert {"/tmp", *re.findall(r"^VOLUME (.*)$", dockerfile, re.MULTILINE)} <= mounted
    assert {each["name"] for each in container(releases[name])["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }


def test_cuda_asks_for_a_gpu_and_its_image(releases: dict[str, dict[str, Any]]) -> None:
    assert container(releases["cuda"])["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container(releases["cuda"])["image"].endswith(":cuda")
    assert environment(releases["cuda"])["HNET_DEVICE"] == "cuda"
    assert "nvidia.com/gpu" not in container(releases["cpu"])["resources"]["limits"]


def test_keys_reach_the_server_as_a_file(releases: dict[str, dict[str, Any]]) -> None:
    path = Path(str(environment(releases["everything"])["HNET_API_KEY_FILE"]))
    secret = releases["everything"]["Secret"]
    assert secret["stringData"] == {path.name: "one\ntwo"}
    for name, expected in (("everything", secret["metadata"]["name"]), ("hpa", "clients")):
        pod = releases[name]["Deployment"]["spec"]["template"]["spec"]
        (volume,) = (each for each in pod["volumes"] if each["name"] == "keys")
        assert volume["secret"]["secretName"] == expected
        assert {"name": "keys", "mountPath": str(path.parent), "readOnly": True} in container(releases[name])[
            "volumeMounts"
        ]
    assert "HNET_API_KEY_FILE" not in environment(releases["cpu"])


def test_the_claim_that_is_mounted_is_the_charts(releases: dict[str, dict[str, Any]]) -> None:
    for name in ("cpu", "everything"):
        pod = releases[name]["Deployment"]["spec"]["template"]["spec"]
        (volume,) = (each for each in pod["volumes"] if each["name"] == "models")
        assert (
            volume["persistentVolumeClaim"]["claimName"] == releases[name]["PersistentVolumeClaim"]["metadata"]["name"]
        )
    assert releases["cpu"]["Deployment"]["spec"]["strategy"]["type"] == "Recreate"
    assert releases["everything"]["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"


def test_scaling_is_by_a_metric_of_the_servers_on_this_deployment(
    releases: dict[str, dict[str, Any]], exposition: dict[str, Metric]
) -> None:
    hpa, keda = releases["hpa"]["HorizontalPodAutoscaler"]["spec"], releases["everything"]["ScaledObject"]["spec"]
    (trigger,) = keda["triggers"]
    ((asked, labels),) = metrics(trigger["metadata"]["query"])
    assert asked == hpa["metrics"][0]["pods"]["metric"]["name"]
    assert asked in exposition
    assert labels == {"namespace", "service"}  # which the ServiceMonitor's targets have
    for name, scaler in (("hpa", hpa), ("everything", keda)):
        assert scaler["scaleTargetRef"]["name"] == releases[name]["Deployment"]["metadata"]["name"]
        assert "replicas" not in releases[name]["Deployment"]["spec"]


def test_prometheus_finds_the_service(releases: dict[str, dict[str, Any]]) -> None:
    monitor, service = releases["everything"]["ServiceMonitor"], releases["everything"]["Service"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["port"]) == ("/metrics", service["spec"]["ports"][0]["name"])
    assert environment(releases["everything"])["HNET_METRICS_PUBLIC"] == "true"
    assert re.fullmatch(".*hnet-serve.*", service["metadata"]["name"])  # the job that alerts ask for


def test_the_gateways_extension_finds_its_gauges_and_pods(releases: dict[str, dict[str, Any]]) -> None:
    assert environment(releases["everything"])["HNET_METRICS_COMPAT"] == "vllm"
    assert {"num_requests_waiting", "kv_cache_usage_perc"} <= set(VLLM.values())
    assert releases["everything"]["Deployment"]["spec"]["template"]["metadata"]["labels"]["pool"] == "hnet"
    assert "HNET_METRICS_COMPAT" not in environment(releases["cpu"])
