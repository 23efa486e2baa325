"""`hnet doctor`: finds the runtime right where it is, and wrong where it has been made so."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from hnet_runtime import machine, parity
from hnet_runtime.comparison import Reading, Trace, check, compare
from hnet_runtime.doctor import TEXT, dispatch_table, examine
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.native.library import open_library
from hnet_runtime.ops.prefill import OPS
from hnet_runtime.ops.triton.libraries import CAUSAL_CONV1D, FLASH_ATTN, Choice
from hnet_runtime.parity import read_by, read_by_reference
from server.cli.prefill_table import prefill_lines
from tests.gpu.steps import captured

DATA = b"\xfe" + TEXT[:60]
NATIVE = pytest.mark.skipif(open_library() is None, reason="no native library is built here")


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=NATIVE)])
def test_runtime_is_found_right_on_every_golden_model(golden, kernels):
    diagnosis = examine(golden.path, kernels=kernels)
    assert diagnosis.passed
    assert diagnosis.kernels.startswith(kernels)
    reference, *_, spans, crowd = diagnosis.checks
    assert len(diagnosis.checks) == (3 if kernels == "torch" else 4)
    assert not any(reference.difference.flips)
    assert spans.difference.bitwise
    assert crowd.difference.bitwise
    assert len(reference.difference.positions) == golden.config.num_routed_stages
    assert diagnosis.embedding_bytes + sum(diagnosis.stage_bytes) == 4 * golden.config.num_parameters
    assert diagnosis.served_bytes >= 4 * golden.config.num_parameters
    assert {step.stage for step in diagnosis.steps} == set(range(len(golden.config.stages)))
    assert sum(step.count for step in diagnosis.steps) == diagnosis.checked_bytes


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=NATIVE)])
def test_bfloat16_is_held_to_its_own_measure(golden_case, kernels):
    diagnosis = examine(golden_case("b_2stage").path, dtype="bfloat16", kernels=kernels)
    assert diagnosis.dtype == "bfloat16"
    assert diagnosis.passed
    assert diagnosis.checks[0].difference.max_abs > 1e-3
    assert "rms" in diagnosis.checks[0].demand


@NATIVE
def test_int8_is_checked_beside_what_it_was_made_of(golden_case):
    diagnosis = examine(golden_case("b_2stage").path, quantization="int8")
    assert diagnosis.passed
    assert diagnosis.kernels.endswith("int8")
    (quantized,) = (each for each in diagnosis.checks if each.name.startswith("int8"))
    assert 1e-3 < quantized.difference.rms < 1.0
    assert diagnosis.served_bytes < sum(diagnosis.stage_bytes)


def test_report_says_what_runs_and_that_it_is_right(hnet):
    result = hnet("doctor", "--kernels", "torch")
    assert (result.code, result.errors) == (0, "")
    for said in ("PyTorch", "processor", "demo, 4.0M parameters, float32", "torch on cpu", "stage 0 alone", "sampler"):
        assert said in result.text
    assert result.text.count(": ok (") == 3
    assert "the runtime is right here" in result.text


def test_report_says_what_a_gpu_would_read_prompts_with_and_why(hnet, monkeypatch, golden_case):
    pytest.importorskip("triton")
    for module in (CAUSAL_CONV1D.module, FLASH_ATTN.module):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ModuleNotFoundError
    text = hnet("doctor", golden_case("a_1stage").path).text
    assert "on CUDA    scan of prompts: triton; not mamba-ssm: its chunk scan takes one initial state" in text
    assert "smoothing of prompts: triton\n" in text
    assert "attention of prompts: triton; not flash-attn: it runs only where kernels=libraries asks for it\n" in text
    text = hnet("doctor", golden_case("a_1stage").path, "--kernels", "torch").text
    assert "attention of prompts: torch; not triton: torch is asked for\n" in text


def test_what_reads_only_some_prompts_says_which():
    chosen = Choice("attention", "flash-attn", "spans from 0", "triton", {"other": "it is slow"})
    plain = Choice("smoothing", "triton")
    assert prefill_lines([chosen, plain]) == [
        ("on CUDA", "attention of prompts: flash-attn for spans from 0, else triton; not other: it is slow"),
        ("", "smoothing of prompts: triton"),
    ]


def test_json_holds_every_figure(hnet, golden_case):
    document = json.loads(hnet("doctor", golden_case("b_2stage").path, "--json").text)
    assert document["passed"] is True
    assert document["machine"]["torch"] == torch.__version__
    assert set(document["machine"]["packages"]) == {"triton", "mamba-ssm", "flash-attn", "causal-conv1d"}
    assert len(document["stage_bytes"]) == 3
    assert document["checks"][0]["difference"]["max_abs"] < 1e-3
    assert all(step["seconds"] > 0 for step in document["steps"])
    assert {each["name"] for each in document["instruction_sets"]} == {"amx", "avx512", "avx2", "portable"}
    assert {"router", "EMA", "sampler"} <= {each["name"] for each in document["dispatch"]}
    assert [each["op"] for each in document["prefill_on_cuda"]] == list(OPS)


def test_wrong_runtime_is_found_out_and_fails(hnet, golden_case, monkeypatch):
    honest = HNet.logits
    monkeypatch.setattr(HNet, "logits", lambda self, hidden: honest(self, hidden) + 0.01)
    result = hnet("doctor", golden_case("a_1stage").path, "--kernels", "torch")
    assert result.code == 1
    assert result.text.count("FAILED") == 1
    assert "torch path against the reference: FAILED" in result.text
    assert "NOT right" in result.text


@NATIVE
def test_native_kernels_that_are_wrong_are_found_out(golden_case, monkeypatch):
    honest = NativeHNet.run

    def dishonest(self, state, rows, pieces, num_logits):
        result = honest(self, state, rows, pieces, num_logits)
        return replace(result, logits=result.logits + 0.01)

    monkeypatch.setattr(NativeHNet, "run", dishonest)
    checks = examine(golden_case("a_1stage").path, kernels="native").checks
    assert [each.passed for each in checks] == [False, False, True, True]


def test_on_a_gpu_what_serves_there_is_checked(monkeypatch, golden_case):
    """Static steps on a CPU stand in for those of a GPU."""
    case = golden_case("b_2stage")
    ops = replace(StepOps.torch(), name="triton")
    monkeypatch.setattr(parity, "build_model", lambda config, weights, *_: captured(config, weights, ops=ops))
    findings = parity.check_runtime(case.config, case.weights, DATA)
    assert findings.kernels == "triton"
    assert findings.checks[0].name == "triton path against the reference"
    assert all(each.passed for each in findings.checks)


def test_triton_runs_all_but_what_reads_weights():
    table = {each.name: each.code for each in dispatch_table("triton", "bfloat16", None)}
    assert (table["embedding"], table["Mamba-2 state"]) == ("torch", "triton")
    assert table["head"] == "torch, bfloat16 weights, bfloat16 activations"
    assert table["residual projection"] == "torch, float32 weights and activations"
    assert dispatch_table("torch", "bfloat16", None)[0].code == "torch"


def test_runtime_that_depends_on_the_crowd_is_found_out(monkeypatch, golden_case):
    honest = HNet.logits
    monkeypatch.setattr(HNet, "logits", lambda self, hidden: honest(self, hidden) + 1e-6 * (8 < len(hidden) < 60))
    case = golden_case("a_1stage")
    findings = parity.check_runtime(case.config, case.weights, DATA)
    assert [each.passed for each in findings.checks] == [True, True, False]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_weights_that_are_not_numbers_fail_the_checks(hnet, golden_case, tmp_path, kernels):
    case = golden_case("e_iso_T2")
    weights = dict(case.weights)
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], float("nan"))
    torch.save(weights, tmp_path / "model.pt")
    (tmp_path / "config.json").write_bytes((case.path / "config.json").read_bytes())
    result = hnet("doctor", tmp_path, "--json", "--kernels", kernels)
    assert result.code == 1
    document = json.loads(result.text)
    assert document["checks"][0]["difference"]["max_abs"] is None
    assert not any(each["passed"] for each in document["checks"])


@pytest.fixture
def readings(golden_case) -> tuple[Reading, Reading]:
    """The reference's and the torch path's reading of a two-stage model."""
    case = golden_case("b_2stage")
    return read_by_reference(case.config, case.weights), read_by(HNet(case.config, case.weights))


def test_readings_agree_on_positions_and_boundaries(readings):
    reference, runtime = (reading(DATA) for reading in readings)
    assert runtime.boundaries == reference.boundaries
    assert [list(p) for p in runtime.p] == [list(p) for p in reference.p]
    assert list(reference.p[0]) == list(range(len(DATA)))
    assert set(reference.p[1]) == reference.boundaries[0]


def test_a_flipped_boundary_is_counted_and_the_rest_is_read_anew(readings):
    reference, _ = readings
    missing = sorted(reference(DATA).boundaries[0])[3]

    def flipped(data: bytes) -> Trace:
        trace = reference(data)
        outer, inner = trace.boundaries
        gone = {missing} if data == DATA else set()
        return replace(trace, boundaries=(outer - gone, inner - gone))

    difference = compare(reference, flipped, DATA)
    assert difference.flips == (1, 0)
    # All but the byte they disagree about; BOS counts twice, for the rest begins with it as well.
    assert difference.compared == len(DATA)
    assert not difference.bitwise
    assert not check("x", reference, flipped, DATA, parity.FLOAT32).passed
    assert check("x", reference, flipped, DATA, parity.BFLOAT16).passed


def test_readings_that_disagree_about_boundaries_everywhere_are_no_match(readings):
    reference, _ = readings

    def opposite(data: bytes) -> Trace:
        trace = reference(data)
        outer, inner = trace.boundaries
        return replace(trace, boundaries=(frozenset(range(len(data))) - outer | {0}, inner))

    difference = compare(reference, opposite, DATA)
    assert difference.flips[0] > 20
    assert difference.p_max_abs == 0.0  # nothing else would tell
    for tolerance in (parity.FLOAT32, parity.FLOAT32_ACTIVATIONS, parity.BFLOAT16, parity.INT8):
        assert not check("x", reference, opposite, DATA, tolerance).passed


@pytest.mark.parametrize(("shift", "fine", "coarse"), [(1e-4, True, True), (0.1, False, True), (1.0, False, False)])
def test_logits_too_far_apart_fail_in_either_measure(readings, shift, fine, coarse):
    reference, _ = readings

    def shifted(data: bytes) -> Trace:
        trace = reference(data)
        return replace(trace, logits=trace.logits + shift)

    assert check("x", reference, shifted, DATA, parity.FLOAT32).passed is fine
    assert check("x", reference, shifted, DATA, parity.BFLOAT16).passed is coarse
    assert not check("x", reference, shifted, DATA, parity.EXACT).passed


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
