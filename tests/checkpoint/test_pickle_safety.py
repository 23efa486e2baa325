"""Nothing in a `.pt` runs; configuration containers in it do no harm and need no package."""

from __future__ import annotations

import collections
import os
import pickle
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch

from hnet_runtime.checkpoint import CheckpointError, load_weights, locate
from hnet_runtime.checkpoint.pickle_safety import open_pickle


class Evil:
    """Unpickled without care, makes a file."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _touch(path: Path) -> str:
    return f"touch {path}"


EVIL_CALLS = [
    (os.system, lambda path: (_touch(path),)),
    (subprocess.call, lambda path: (["touch", str(path)],)),
    (eval, lambda path: (f"open({str(path)!r}, 'w')",)),
    (exec, lambda path: (f"open({str(path)!r}, 'w')",)),
    (open, lambda path: (str(path), "w")),
    (getattr, lambda path: (path, "touch")),
]


@pytest.mark.parametrize(("function", "arguments"), EVIL_CALLS, ids=[call.__name__ for call, _ in EVIL_CALLS])
def test_code_in_a_pickle_is_refused_and_not_run(small, tmp_path, function, arguments):
    proof = tmp_path / "proof"
    path = small.write_pickle(tmp_path, payload=Evil(function, *arguments(proof)))
    with pytest.raises(CheckpointError) as caught:
        load_weights(locate(tmp_path), dtype=torch.float32)
    message = str(caught.value)
    assert str(path) in message
    assert "refused" in message
    assert function.__name__ in message
    assert "\n" not in message
    assert not proof.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_pickle_protocols_run_nothing_either(tmp_path, protocol):
    proof = tmp_path / "proof"
    path = tmp_path / "model.pt"
    torch.save({"payload": Evil(os.system, _touch(proof))}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="refused"):
        open_pickle(path)
    assert not proof.exists()


def test_bare_pickle_is_refused_unread(tmp_path):
    proof = tmp_path / "proof"
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Evil(os.system, _touch(proof))))
    with pytest.raises(CheckpointError, match=r"model\.pt: refused"):
        open_pickle(path)
    assert not proof.exists()


def test_environment_cannot_switch_the_guard_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof = tmp_path / "proof"
    torch.save({"payload": Evil(os.system, _touch(proof))}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="refused"):
        open_pickle(tmp_path / "model.pt")
    assert not proof.exists()


def test_the_pickles_above_would_run_without_the_guard(tmp_path):
    proof = tmp_path / "proof"
    torch.save({"payload": Evil(os.system, _touch(proof))}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert proof.exists()


def _module(name: str, *classes: str) -> types.ModuleType:
    module = types.ModuleType(name)
    for class_name in classes:
        setattr(module, class_name, type(class_name, (), {"__module__": name}))
    return module


@pytest.fixture
def containers(monkeypatch):
    """Modules whose classes pickle under omegaconf's names, gone again when the fixture's block ends.

    The package itself is not installed here, which is what the loader must cope with.
    """
    modules = [
        _module("omegaconf"),
        _module("omegaconf.listconfig", "ListConfig"),
        _module("omegaconf.dictconfig", "DictConfig"),
        _module("omegaconf.base", "ContainerMetadata", "Metadata"),
        _module("omegaconf.nodes", "AnyNode", "IntegerNode"),
    ]
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setitem(sys.modules, module.__name__, module)
        yield {module.__name__: module for module in modules}


def _build(cls, **state):
    made = cls()
    made.__dict__.update(state)
    return made


def _list_config(modules, values):
    """An object of the shape that the real container's pickles have."""
    base, nodes = modules["omegaconf.base"], modules["omegaconf.nodes"]
    cache: collections.defaultdict[str, dict[str, int]] = collections.defaultdict(dict)
    cache["resolver"]["key"] = 1
    metadata = _build(
        base.ContainerMetadata, ref_type=typing.Any, object_type=list, optional=True, key=None,
        flags={"allow_objects": True}, resolver_cache=cache, key_type=int, element_type=typing.Any,
    )  # fmt: skip
    content = [_build(nodes.AnyNode, _val=value, _metadata=_build(base.Metadata, key=0)) for value in values]
    return _build(modules["omegaconf.listconfig"].ListConfig, _metadata=metadata, _content=content, _parent=None)


def _forget(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "omegaconf"]:
        monkeypatch.delitem(sys.modules, name)


def test_configuration_containers_load_without_their_package(small, tmp_path, containers, monkeypatch):
    layout = _list_config(containers, ["m4", "T22"])
    nested = _build(containers["omegaconf.dictconfig"].DictConfig, _content={"arch_layout": layout}, _metadata=None)
    small.write_pickle(tmp_path, config=nested, layout=layout)
    _forget(monkeypatch)
    assert "omegaconf" not in sys.modules
    weights = load_weights(locate(tmp_path), dtype=torch.float32)
    assert "omegaconf" not in sys.modules
    assert set(weights) == set(small.weights)


def test_containers_in_the_metadata_of_a_state_dict_load(small, tmp_path, containers, monkeypatch):
    small.write_config(tmp_path)
    state = collections.OrderedDict(small.weights)
    state._metadata = {"": {"version": 1, "layout": _list_config(containers, ["m4"])}}
    torch.save(state, tmp_path / "model.pt")
    _forget(monkeypatch)
    assert set(load_weights(locate(tmp_path), dtype=torch.float32)) == set(small.weights)


def test_containers_give_no_cover_to_code(small, tmp_path, containers, monkeypatch):
    proof = tmp_path / "proof"
    layout = _list_config(containers, [Evil(os.system, _touch(proof))])
    small.write_pickle(tmp_path, layout=layout)
    _forget(monkeypatch)
    with pytest.raises(CheckpointError, match="system"):
        load_weights(locate(tmp_path), dtype=torch.float32)
    assert not proof.exists()


def test_stand_ins_are_forgotten_after_loading(small, tmp_path, containers, monkeypatch):
    before = set(torch.serialization.get_safe_globals())
    path = small.write_pickle(tmp_path, layout=_list_config(containers, ["m4"]))
    _forget(monkeypatch)
    open_pickle(path)
    assert set(torch.serialization.get_safe_globals()) == before
