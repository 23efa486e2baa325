"""Fixtures of the checkpoint tests: a small model on disk in every form, and a stand-in for the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hnet_runtime.config import ModelConfig


@dataclass
class SmallModel:
    """A golden model's configuration and weights, to be written in some form and damaged at will."""

    document: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.document)

    def write_config(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "config.json"
        path.write_text(json.dumps(self.document))
        return path

    def write_pickle(self, directory: Path, name: str = "model.pt", **extra: Any) -> Path:
        """`config.json` and a `.pt` holding the weights and whatever else is named."""
        self.write_config(directory)
        torch.save({**self.weights, **extra}, directory / name)
        return directory / name

    def write_safetensors(self, directory: Path, name: str = "model.safetensors") -> Path:
        self.write_config(directory)
        save_file(self.weights, directory / name, {"format": "pt"})
        return directory / name

    def write_shards(self, directory: Path) -> Path:
        """Two shards and their index; returns the index."""
        self.write_config(directory)
        keys = sorted(self.weights)
        weight_map = {}
        for number, part in enumerate((keys[::2], keys[1::2]), start=1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({key: self.weights[key] for key in part}, directory / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index


@pytest.fixture
def small(golden_case: Callable[[str], Any]) -> SmallModel:
    """Two routed stages, attention and Mamba-2, widening: a fresh copy for every test."""
    case = golden_case("b_2stage")
    document = json.loads((case.path / "config.json").read_text())
    return SmallModel(document, {key: tensor.clone() for key, tensor in case.weights.items()})


@dataclass
class Repository:
    """One repository of the stand-in: files by name, at one commit."""

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    card: dict[str, Any] | None = None


@dataclass
class HubStandIn:
    """Answers what the hub client asks over HTTP on 127.0.0.1, and keeps the paths it was asked for."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: bool = False

    @staticmethod
    def new_repository(files: dict[str, bytes]) -> Repository:
        return Repository(files)

    def downloads(self) -> list[str]:
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.broken:
            return 503, {}, b"out of order"
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return 404, {}, b""

    def _find(self, model: str, revision: str) -> Repository | tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(model)
        if repository is None:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if revision not in (*repository.revisions, repository.commit):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        return repository

    def _info(self, model: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        found = self._find(model, revision)
        if isinstance(found, tuple):
            return found
        siblings = [{"rfilename": name} for name in sorted(found.files)]
        info = {"id": model, "sha": found.commit, "siblings": siblings, "cardData": found.card, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _file(self, model: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        found = self._find(model, revision)
        if isinstance(found, tuple):
            return found
        if found.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        if name not in found.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.commit}, b""
        data = found.files[name]
        etag = hashlib.sha256(data).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": found.commit}, data


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    stand_in = HubStandIn()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stand_in.requests.append(f"{self.command} {self.path}")
            status, headers, body = stand_in.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """The tests read `requests` instead."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield stand_in
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """The bundled demo model, copied to where a test may change it."""
    bundled = Path(__file__).parents[2] / "models" / "demo"
    return Path(shutil.copytree(bundled, tmp_path / "demo-copy"))
