"""Where a model is: the MODEL argument of every command → a configuration and weight files.

Knows names, paths and what a model directory looks like. Does not open a weight file,
and needs no torch.
"""

from __future__ import annotations

import logging
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hnet_runtime.checkpoint.directory import (
    CONFIG_NAME,
    PICKLE_NAME,
    SAFETENSORS_NAME,
    WEIGHT_SUFFIXES,
    expand_index,
    weight_names,
)
from hnet_runtime.checkpoint.errors import CheckpointError
from hnet_runtime.config import ModelConfig, official_names

RANDOM_PREFIX = "random:"
DEMO_NAME = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: what it is called, its shape, and the files its weights are in.

    `weights` is empty for a model of random weights, which `seed` then fixes. `commit` is the
    hub's commit where the files came from there.
    """

    name: str
    config: ModelConfig
    weights: tuple[Path, ...]
    commit: str | None = None
    seed: int = 0

    @property
    def is_random(self) -> bool:
        return not self.weights


def locate(model: str | Path | None, config: str | Path | None = None, revision: str | None = None) -> ModelSource:
    """Finds a model.

    `model` is a directory (`config.json` beside `*.safetensors` or an official `*.pt`), a `.pt` or
    `.safetensors` file, a hub id (`owner/name`, downloaded on first use), `random:NAME` with an
    official configuration's name or a path to one, or `demo` or None: the bundled demo model. A path
    that exists wins over every other reading. `config` is a configuration file, a directory with one, or an
    official name; without it `config.json` beside the weights is read, or else the official
    configuration of the same name. `revision` is a hub branch, tag or commit.

    Raises CheckpointError or ConfigError, one line naming the culprit.
    """
    text = DEMO_NAME if model is None else os.fspath(model)
    if not text:
        raise CheckpointError("the name of the model is empty")
    if text.startswith(RANDOM_PREFIX):
        _refuse_revision(revision, text)
        return _from_random(text, config)
    if model is not None and exists(text):
        path = Path(os.path.expanduser(text))
        _refuse_revision(revision, text)
        if path.is_dir():
            return _from_directory(path, config, name=path.resolve().name)
        return _from_file(path, config)
    if text == DEMO_NAME:
        _refuse_revision(revision, "the bundled demo model")
        return _from_directory(demo_directory(), config, name=DEMO_NAME)
    if not is_hub_id(text):
        raise CheckpointError(f"{text!r}: no such file or directory, and not a hub id (owner/name){_hint(text)}")
    return _from_hub(text, config, revision)


def exists(text: str) -> bool:
    """Whether `text` is the path of something; text that could be none (too long, say) is not."""
    return os.path.exists(os.path.expanduser(text))


def is_model_name(text: str) -> bool:
    """Whether `text` reads as a MODEL: something that exists, `random:…`, `demo`, or the form of a hub id."""
    return exists(text) or text.startswith(RANDOM_PREFIX) or text == DEMO_NAME or is_hub_id(text)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, `owner/name`, and not of a file's path."""
    return bool(_HUB_ID.fullmatch(text)) and not text.endswith((*WEIGHT_SUFFIXES, ".json"))


def demo_directory() -> Path:
    """The bundled demo model: `models/demo` of a checkout, or the share directory of an installed wheel."""
    candidates = [Path(__file__).resolve().parents[2] / "models" / "demo"]
    for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")):
        data = sysconfig.get_path("data", scheme)
        candidates.append(Path(data) / "share" / "hnet-serve" / "models" / "demo")
    for candidate in candidates:
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    raise CheckpointError(f"the bundled demo model is not installed: {candidates[0]} does not exist; name a model")


def _from_random(text: str, config: str | Path | None) -> ModelSource:
    shape = text[len(RANDOM_PREFIX) :]
    if config is not None:
        raise CheckpointError(f"{text}: takes its configuration from the name after 'random:', not from --config")
    if not shape:
        raise CheckpointError(f"{text}: name a configuration after 'random:': {', '.join(official_names())} or a path")
    return ModelSource(text, _read_config(shape), weights=())


def _from_file(path: Path, config: str | Path | None) -> ModelSource:
    if path.suffix not in WEIGHT_SUFFIXES:
        raise CheckpointError(f"{path}: a weight file ends in .safetensors or .pt")
    name = path.parent.resolve().name if path.name in (SAFETENSORS_NAME, PICKLE_NAME) else path.stem
    beside = path.parent / CONFIG_NAME
    return ModelSource(name, _find_config(config, beside, [path.stem, name], str(path)), (path,))


def _from_directory(directory: Path, config: str | Path | None, name: str) -> ModelSource:
    names = {entry.name for entry in directory.iterdir() if entry.is_file()}
    weights = expand_index(directory, weight_names(names, str(directory)))
    stems = [weights[0].stem, directory.resolve().name]
    return ModelSource(name, _find_config(config, directory / CONFIG_NAME, stems, str(directory)), weights)


def _from_hub(model: str, config: str | Path | None, revision: str | None) -> ModelSource:
    from hnet_runtime.checkpoint.hub import fetch

    snapshot = fetch(model, revision)
    names = {entry.name for entry in snapshot.directory.iterdir() if entry.is_file()}
    weights = expand_index(snapshot.directory, weight_names(names, model))
    stems = [weights[0].stem, model.split("/")[1]]
    found = _find_config(config, snapshot.directory / CONFIG_NAME, stems, model)
    return ModelSource(model, found, weights, commit=snapshot.commit)


def _find_config(config: str | Path | None, beside: Path, stems: list[str], where: str) -> ModelConfig:
    if config is not None:
        return _read_config(config)
    if beside.is_file():
        return ModelConfig.from_file(beside)
    for stem in stems:
        if stem in official_names():
            _log.info("%s: no config.json; using the official configuration %s", where, stem)
            return ModelConfig.official(stem)
    raise CheckpointError(f"{where}: no {CONFIG_NAME} beside the weights; give one with --config")


def _read_config(config: str | Path) -> ModelConfig:
    """A configuration by path (a file, or a directory with `config.json`) or by official name."""
    if exists(str(config)):
        path = Path(os.path.expanduser(config))
        return ModelConfig.from_file(path / CONFIG_NAME if path.is_dir() else path)
    if str(config) in official_names():
        return ModelConfig.official(str(config))
    known = ", ".join(official_names())
    raise CheckpointError(f"{config}: no such configuration: neither a file nor one of {known}")


def _refuse_revision(revision: str | None, text: str) -> None:
    if revision is not None:
        raise CheckpointError(f"--revision {revision} is for hub ids, and {text} is none")


def _hint(text: str) -> str:
    if text in official_names():
        return f"; did you mean cartesia-ai/{text} or {RANDOM_PREFIX}{text}?"
    return ""
