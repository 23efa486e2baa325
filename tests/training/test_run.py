"""Whole runs of a tiny model, as processes: they learn, and go on after a kill as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.checkpoint import StateError, newest
from training.journal import read
from training.run import train
from training.settings import load
from training.worker import Job, work


def last_state(folder: Path):
    state = newest(folder / "states")
    assert state is not None
    return state


def assert_same(found: Path, wanted: Path) -> None:
    ours, theirs = last_state(found), last_state(wanted)
    assert ours.counters.step == theirs.counters.step
    assert ours.parameters.keys() == theirs.parameters.keys()
    for key, tensor in ours.parameters.items():
        assert torch.equal(tensor, theirs.parameters[key]), key
    for key, tensor in ours.moments.items():
        assert torch.equal(tensor, theirs.moments[key]), key


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["bits_per_byte"]) for line in read(folder)]


def begin(settings: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server.cli.main", "train", str(settings), "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_states(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        state = newest(folder / "states") if (folder / "states").exists() else None
        if state is not None and state.counters.step >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no state of step {count}: {process.stdout and process.stdout.read()}")


def wait_for_rest(folder: Path) -> None:
    """Until nobody writes states any more: workers whose parent was killed see it after the step under way."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 3:
        step = last_state(folder).counters.step
        if step != seen:
            seen, since = step, time.monotonic()
        time.sleep(0.05)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "kills"), [(1, (3, 9)), (2, (9,))])
def test_a_run_that_was_killed_goes_on_along_the_same_curve(tmp_path, make_settings, processes, kills) -> None:
    settings = make_settings(processes=processes, total=256 * 40)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = begin(settings, whole)
    assert uninterrupted.wait(180) == 0, uninterrupted.stdout and uninterrupted.stdout.read()
    for steps in kills:
        process = begin(settings, killed)
        wait_for_states(killed, steps, process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        wait_for_rest(killed)
    assert 9 <= last_state(killed).counters.step < 40
    finished = begin(settings, killed)
    assert finished.wait(180) == 0
    assert_same(killed, whole)
    assert [step for step, _ in curve(killed)] == sorted(step for step, _ in curve(killed))


def test_a_state_cut_short_is_not_gone_on_from(tmp_path, make_settings) -> None:
    settings, folder = make_settings(), tmp_path / "run"
    assert train(settings, folder, until=256 * 3)
    unfinished = folder / "states" / "unfinished-state-000000009"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert last_state(folder).counters.step == 3
    assert train(settings, folder, until=256 * 4)
    assert last_state(folder).counters.step == 4


def test_two_processes_make_the_steps_of_one(tmp_path, make_settings) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(make_settings(total=256 * 12), one)
    process = begin(make_settings(total=256 * 12, processes=2), two)
    assert process.wait(180) == 0
    ours, theirs = last_state(two), last_state(one)
    for key, tensor in ours.parameters.items():
        assert (tensor - theirs.parameters[key]).abs().max() < 1e-3, key


def test_a_run_learns_and_exports_what_the_runtime_serves(tmp_path, make_settings) -> None:
    from hnet_runtime.engine.engine import Engine
    from hnet_runtime.engine.messages import SamplingParams

    settings, folder = make_settings(total=256 * 64, evaluate=256 * 32), tmp_path / "run"
    assert train(settings, folder)
    steps = [line for line in read(folder) if line["kind"] == "evaluation"]
    assert steps[-1]["bits_per_byte"] < steps[0]["bits_per_byte"] < 8
    assert set(steps[-1]["stages"][0]["bits"]) == {"mean", "other", "stale"}
    engine = Engine.from_pretrained(str(folder / "export"), device="cpu", dtype="float32")
    (completion,) = engine.generate([b"\xfethe "], SamplingParams(max_tokens=16, temperature=0))
    assert len(completion.data) == 16


def test_an_export_holds_the_parameters_of_the_last_state(tmp_path, make_settings) -> None:
    settings, folder = make_settings(), tmp_path / "run"
    assert train(settings, folder)
    exported = load_file(folder / "export" / "model.safetensors")
    for key, tensor in last_state(folder).parameters.items():
        assert torch.equal(exported[key], tensor.to(exported[key].dtype)), key
    assert json.loads((folder / "export" / "config.json").read_text())["arch_layout"] == ["m1", ["T1"], "m1"]


def test_several_processes_are_not_begun_where_one_would_refuse(tmp_path, make_settings) -> None:
    folder = tmp_path / "run"
    assert train(make_settings(), folder, until=256 * 2)
    with pytest.raises(StateError, match=r"batch\.processes is 2, but the run so far had 1"):
        train(make_settings(processes=2), folder)


def test_changed_settings_are_refused_by_name_unless_accepted(tmp_path, make_settings) -> None:
    folder = tmp_path / "run"
    assert train(make_settings(), folder, until=256 * 2)
    changed = make_settings(multipliers=[1.0, 0.5])
    with pytest.raises(
        StateError, match=r"optimizer\.multipliers is \[1\.0, 0\.5\], but the run so far had \[1\.0, 0\.25\]"
    ):
        train(changed, folder)
    assert train(changed, folder, accept_changes=True, until=256 * 3)
    assert last_state(folder).counters.step == 3


def test_a_longer_schedule_is_no_change(tmp_path, make_settings) -> None:
    folder = tmp_path / "run"
    assert train(make_settings(), folder)
    assert train(make_settings(total=256 * 20), folder)
    assert last_state(folder).counters.step == 20


def test_a_tampered_state_is_refused_by_its_path(tmp_path, make_settings) -> None:
    settings, folder = make_settings(), tmp_path / "run"
    assert train(settings, folder, until=256 * 2)
    path = sorted((folder / "states").iterdir())[-1]
    (path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(StateError, match="state-000000002: cannot be read"):
        train(settings, folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 2])
def test_being_told_to_stop_leaves_a_state(tmp_path, make_settings, processes) -> None:
    settings, folder = make_settings(total=256 * 40_000, checkpoint=1000, processes=processes), tmp_path / "run"
    process = begin(settings, folder)
    deadline = time.monotonic() + 60
    while not (folder / "journal.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert 0 < last_state(folder).counters.step < 40_000


def test_an_isotropic_model_and_two_stages_are_trained_alike(tmp_path, make_settings) -> None:
    two = {
        "layout": '["m1", ["T1", ["T1"], "T1"], "m1"]',
        "widths": [64, 64, 96],
        "mlp": [0, 128, 128],
        "heads": [2, 2, 2],
        "rotary": [16, 16, 16],
        "windows": [-1, -1, -1],
        "multipliers": [1.0, 0.5, 0.25],
        "ratio": [3.0, 3.0],
        "total": 256 * 8,
        "evaluate": 256 * 8,
    }
    one = {key: value[-1:] for key, value in two.items() if isinstance(value, list)} | {
        "layout": '["T2"]',
        "multipliers": [1.0],
        "ratio": [],
        "total": 256 * 8,
        "evaluate": 256 * 8,
    }
    for name, shape, routed in (("two", two, 2), ("one", one, 0)):
        assert train(make_settings(**shape), tmp_path / name)
        found = [line for line in read(tmp_path / name) if line["kind"] == "evaluation"]
        assert len(found[-1]["stages"]) == routed
        assert len(found[-1]["main"]) in (1, 2)


def test_a_worker_knows_what_it_has_seen(tmp_path, make_settings) -> None:
    settings, config = load(make_settings())
    job = Job(settings, config, tmp_path / "run", tmp_path / "meeting", until=256 * 5)
    said: list[str] = []
    assert work(0, job, said.append)
    assert last_state(tmp_path / "run").counters.seen == 256 * 5
    assert any("bits/byte" in line for line in said)
