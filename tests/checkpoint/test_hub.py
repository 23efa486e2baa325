"""Hub ids, against a stand-in of the hub's HTTP API on this machine, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CLIENT = """
import json, logging, sys
logging.basicConfig(format="%(message)s")
from hnet_runtime.checkpoint import CheckpointError, load_weights, locate
model, config, revision = (argument or None for argument in sys.argv[1:4])
try:
    source = locate(model, config, revision)
    report = {
        "name": source.name,
        "commit": source.commit,
        "files": [path.name for path in source.weights],
        "stages": len(source.config.stages),
    }
    if sys.argv[4]:
        import torch
        report["keys"] = len(load_weights(source, dtype=torch.float32))
except CheckpointError as error:
    report = {"error": str(error)}
print(json.dumps(report))
"""


@dataclass
class Result:
    report: dict[str, Any]
    log: str


Ask = Callable[..., Result]


@pytest.fixture
def ask(hub, tmp_path) -> Ask:
    def run(model: str, *, config: str = "", revision: str = "", load: bool = False, **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, model, config, revision, "1" if load else ""],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
                "HF_HOME": str(tmp_path / "hub-home"),
                "HF_ENDPOINT": hub.endpoint,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "NO_PROXY": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parents[2]),
                **environment,
            },
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Result(json.loads(done.stdout), done.stderr)

    return run


@pytest.fixture
def publish(hub, small, tmp_path) -> Callable[..., Any]:
    """Puts the small model on the stand-in as `owner/fable`, in the form named; returns its repository."""
    from dataclasses import replace  # the repository class is the conftest's own

    def put(
        write: str = "write_safetensors", name: str = "owner/fable", drop: tuple[str, ...] = (), **fields: Any
    ) -> Any:
        directory = tmp_path / "published"
        getattr(small, write)(directory)
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in drop}
        hub.repositories[name] = replace(hub.new_repository(files), **fields)
        return hub.repositories[name]

    return put


def test_hub_id_is_downloaded_and_loaded(ask, publish, small):
    repository = publish()
    result = ask("owner/fable", load=True)
    assert result.report == {
        "name": "owner/fable",
        "commit": repository.commit,
        "files": ["model.safetensors"],
        "stages": 3,
        "keys": len(small.weights),
    }


def test_only_what_is_needed_is_downloaded(ask, publish, hub):
    repository = publish("write_pickle")
    ask("owner/fable")
    assert sorted(hub.downloads()) == ["config.json", "model.pt"]
    publish("write_safetensors")
    repository = hub.repositories["owner/fable"]
    repository.files |= {"README.md": b"# a card", "events.log": b"x", "sub/other.safetensors": b"x", "run.py": b"x"}
    hub.requests.clear()
    ask("owner/fable")
    assert "model.safetensors" in hub.downloads()
    assert not {"model.pt", "README.md", "events.log", "other.safetensors", "run.py"} & set(hub.downloads())


def test_shards_are_downloaded_with_their_index(ask, publish, small):
    publish("write_shards")
    result = ask("owner/fable", load=True)
    assert result.report["files"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert result.report["keys"] == len(small.weights)


def test_official_repository_without_config_is_known_by_name(ask, publish):
    publish("write_pickle", name="cartesia-ai/hnet_1stage_L", drop=("config.json",))
    assert ask("cartesia-ai/hnet_1stage_L").report["stages"] == 2


def test_repository_without_config_or_known_name_is_refused(ask, publish):
    publish(drop=("config.json",))
    assert ask("owner/fable").report == {
        "error": "owner/fable: no config.json beside the weights; give one with --config"
    }


def test_given_config_wins(ask, publish, small, tmp_path):
    publish(drop=("config.json",))
    config = small.write_config(tmp_path / "elsewhere")
    assert ask("owner/fable", config=str(config), load=True).report["keys"] == len(small.weights)


def test_revision_chooses_the_commit(ask, publish, hub):
    repository = publish(revisions=("main", "v1"))
    assert ask("owner/fable", revision="v1").report["commit"] == repository.commit
    assert all("/v1" in line for line in hub.requests)
    assert ask("owner/fable", revision=repository.commit).report["commit"] == repository.commit


def test_unknown_revision_is_named(ask, publish):
    publish()
    assert ask("owner/fable", revision="v9").report == {"error": "owner/fable: the hub has no revision 'v9'"}


def test_unknown_repository_is_named(ask):
    error = ask("owner/nothing").report["error"]
    assert error.startswith("owner/nothing: no such file or directory, and no such repository")
    assert "\n" not in error


def test_gated_repository_says_what_to_do(ask, publish):
    publish(gated=True)
    assert "owner/fable: gated" in ask("owner/fable").report["error"]


def test_repository_without_weights_is_named(ask, publish):
    publish(drop=("model.safetensors",))
    assert ask("owner/fable").report == {"error": "owner/fable: no weights there, neither *.safetensors nor *.pt"}


def test_missing_licence_is_said_once(ask, publish):
    publish()
    assert ask("owner/fable").log.count("declares no licence") == 1
    assert "licence" not in ask("owner/fable").log  # cached by now


def test_declared_licence_is_said(ask, publish):
    publish(card={"license": "mit"})
    log = ask("owner/fable").log
    assert "declares the licence mit" in log
    assert "no licence" not in log


def test_second_use_downloads_nothing(ask, publish, hub):
    publish()
    ask("owner/fable")
    hub.requests.clear()
    assert ask("owner/fable", load=True).report["files"] == ["model.safetensors"]
    assert hub.downloads() == []


def test_cached_model_serves_without_a_connection(ask, publish):
    repository = publish()
    ask("owner/fable")
    for unreachable in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        result = ask("owner/fable", load=True, **unreachable)
        assert result.report["commit"] == repository.commit
        assert "using the cached commit" in result.log


def test_half_a_model_in_the_cache_is_no_model(ask, publish, hub, tmp_path):
    publish()
    ask("owner/fable")
    weights = next((tmp_path / "hub-home").rglob("model.safetensors"))
    weights.unlink()
    assert "no weights" in ask("owner/fable", HF_HUB_OFFLINE="1").report["error"]


def test_no_connection_and_no_cache_is_one_line(ask):
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        error = ask("owner/fable", **environment).report["error"]
        assert error.startswith("owner/fable: ")
        assert "\n" not in error
    assert "HF_HUB_OFFLINE is set" in error


def test_hub_out_of_order_is_one_line(ask, hub, publish):
    publish()
    hub.broken = True
    error = ask("owner/fable").report["error"]
    assert error.startswith("owner/fable: the hub")
    assert "503" in error
    assert "\n" not in error


def test_nothing_is_reported_home(ask, publish, hub):
    publish()
    ask("owner/fable", AI_AGENT="someone", AGENT="someone")
    paths = {line.split()[1].split("?")[0] for line in hub.requests}
    assert all(path.startswith(("/api/models/owner/fable", "/owner/fable/resolve/")) for path in paths), paths
