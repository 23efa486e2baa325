"""`hnet doctor`: finds the runtime right where it is, and wrong where it has been made so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hnet_runtime import machine, parity
from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.doctor import TEXT, examine
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.parity import Trace, check, compare, trace_reference, trace_runtime

DATA = b"\xfe" + TEXT[:60]


def test_runtime_is_found_right_on_every_golden_model(golden):
    diagnosis = examine(golden.path)
    assert diagnosis.passed
    assert [each.passed for each in diagnosis.checks] == [True, True, True]
    reference, spans, crowd = diagnosis.checks
    assert not any(reference.difference.flips)
    assert spans.difference.bitwise
    assert crowd.difference.bitwise
    assert len(reference.difference.positions) == golden.config.num_routed_stages
    assert diagnosis.embedding_bytes + sum(diagnosis.stage_bytes) == 4 * golden.config.num_parameters
    assert {step.stage for step in diagnosis.steps} == set(range(len(golden.config.stages)))
    assert sum(step.count for step in diagnosis.steps) == diagnosis.checked_bytes


def test_bfloat16_is_held_to_its_own_measure(golden_case):
    diagnosis = examine(golden_case("b_2stage").path, dtype="bfloat16")
    assert diagnosis.dtype == "bfloat16"
    assert diagnosis.passed
    assert diagnosis.checks[0].difference.max_abs > 1e-3
    assert "rms" in diagnosis.checks[0].demand


def test_report_says_what_runs_and_that_it_is_right(hnet):
    result = hnet("doctor")
    assert (result.code, result.errors) == (0, "")
    for said in ("PyTorch", "processor", "demo, 4.0M parameters, float32", "torch path on cpu", "stage 0 alone"):
        assert said in result.text
    assert result.text.count(": ok (") == 3
    assert "the runtime is right here" in result.text


def test_json_holds_every_figure(hnet, golden_case):
    document = json.loads(hnet("doctor", golden_case("b_2stage").path, "--json").text)
    assert document["passed"] is True
    assert document["machine"]["torch"] == torch.__version__
    assert set(document["machine"]["packages"]) == {"triton", "mamba-ssm", "flash-attn", "causal-conv1d"}
    assert len(document["stage_bytes"]) == 3
    assert document["checks"][0]["difference"]["max_abs"] < 1e-3
    assert all(step["seconds"] > 0 for step in document["steps"])


@pytest.fixture
def broken(monkeypatch):
    """A runtime whose logits are all a little too high."""
    honest = HNet.logits

    def dishonest(self, hidden):
        return honest(self, hidden) + 0.01

    monkeypatch.setattr(HNet, "logits", dishonest)


@pytest.mark.usefixtures("broken")
def test_wrong_runtime_is_found_out_and_fails(hnet, golden_case):
    result = hnet("doctor", golden_case("a_1stage").path)
    assert result.code == 1
    assert result.text.count("FAILED") == 1
    assert "runtime against the reference: FAILED" in result.text
    assert "NOT right" in result.text


def test_runtime_that_depends_on_the_crowd_is_found_out(monkeypatch, golden_case):
    honest = HNet.logits
    monkeypatch.setattr(HNet, "logits", lambda self, hidden: honest(self, hidden) + 1e-6 * (8 < len(hidden) < 60))
    case = golden_case("a_1stage")
    checks, _ = parity.check_runtime(case.config, case.weights, DATA)
    assert [each.passed for each in checks] == [True, True, False]


def test_weights_that_are_not_numbers_fail_the_checks(hnet, golden_case, tmp_path):
    case = golden_case("e_iso_T2")
    weights = dict(case.weights)
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], float("nan"))
    torch.save(weights, tmp_path / "model.pt")
    (tmp_path / "config.json").write_bytes((case.path / "config.json").read_bytes())
    result = hnet("doctor", tmp_path, "--json")
    assert result.code == 1
    document = json.loads(result.text)
    assert document["checks"][0]["difference"]["max_abs"] is None
    assert [each["passed"] for each in document["checks"]] == [False, False, False]


def _traces(case) -> tuple[Trace, Trace]:
    source = locate(case.path)
    weights = load_weights(source, dtype=torch.float32)
    reference = trace_reference(source.config, weights, DATA)
    runtime, _ = trace_runtime(HNet(source.config, weights), [[DATA]])
    return reference, runtime


def test_traces_agree_on_positions_and_boundaries(golden_case):
    reference, runtime = _traces(golden_case("b_2stage"))
    assert runtime.positions == reference.positions
    assert runtime.boundaries == reference.boundaries
    assert reference.positions[0] == tuple(range(len(DATA)))
    assert set(reference.positions[1]) == reference.boundaries[0]


def test_flipped_boundaries_are_counted(golden_case):
    reference, _ = _traces(golden_case("b_2stage"))
    outer, inner = reference.boundaries
    missing = next(iter(outer - inner))
    flipped = replace(reference, boundaries=(outer - {missing}, inner))
    assert compare(reference, flipped).flips == (1, 0)
    assert not check("x", reference, flipped, coarse=False).passed
    assert check("x", reference, flipped, coarse=True).passed  # one in sixty may flip in bfloat16
    many = replace(reference, boundaries=(outer - set(sorted(outer)[1:4]), inner))
    assert not check("x", reference, many, coarse=True).passed


def test_logits_too_far_apart_fail_in_either_measure(golden_case):
    reference, _ = _traces(golden_case("a_1stage"))
    for shift, fine, coarse in ((1e-4, True, True), (0.1, False, True), (1.0, False, False)):
        shifted = replace(reference, logits=reference.logits + shift)
        assert check("x", reference, shifted, coarse=False).passed is fine
        assert check("x", reference, shifted, coarse=True).passed is coarse


def test_machine_is_described_in_plain_values(monkeypatch):
    found = machine.inspect_machine()
    assert found.python.count(".") == 2
    assert found.cores >= 1
    assert found.memory is None or found.memory > 2**28
    monkeypatch.setitem(machine._GPU_PACKAGES, "click", "click")
    assert machine.inspect_machine().packages["click"][0].isdigit()


def test_package_that_does_not_import_says_why(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("import a_module_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(machine._GPU_PACKAGES, "half-installed", "half_installed")
    assert "a_module_nobody_has" in machine.inspect_machine().packages["half-installed"]
