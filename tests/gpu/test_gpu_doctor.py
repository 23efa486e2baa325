"""`hnet doctor --gpu` on CPUs in a GPU's place: right where everything is, and wrong, with exit code 1 and the rest of
the checks done, where a kernel, a replay, a boundary or a process is not."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hnet_runtime.gpu_doctor import device
from hnet_runtime.gpu_doctor.checks import Finding, Settings
from hnet_runtime.gpu_doctor.examination import NoDevice, examine_gpu
from hnet_runtime.gpu_doctor.report import as_document, as_markdown, passed
from hnet_runtime.gpu_doctor.worker import GROUPS
from hnet_runtime.model.step_ops import StepOps
from server.cli.main import main

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def examine(monkeypatch, tmp_path, golden_case):
    """`examine(stand_in, *groups)`: whether all passed, the findings, and the JSON report."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def run(stand_in: str, *groups: str, golden: str | None = None, **settings):
        asked = Settings(
            device=f"tests.gpu.doctor_stand_ins:{stand_in}",
            model=str(golden_case(golden).path) if golden else None,
            rows=(1, 3),
            most_rows=3,
            max_graphs=8,
            text_bytes=24,
            completion_bytes=8,
            official_sizes=False,
            limit_seconds=200.0,
        )
        findings: list[Finding] = []
        report = tmp_path / "report"
        right = examine_gpu(replace(asked, **settings), report, groups=groups or tuple(GROUPS), tell=findings.append)
        assert list(scratch.iterdir()) == []  # nothing is left
        assert sorted(path.name for path in report.iterdir()) == ["gpu-report.json", "gpu-report.md"]
        document = json.loads((report / "gpu-report.json").read_text())
        assert document["passed"] == right
        assert [each["name"] for each in document["findings"]] == [each.name for each in findings]
        return right, findings, (report / "gpu-report.md").read_text()

    return run


def failed(findings: list[Finding]) -> list[str]:
    return [f"{finding.group}: {finding.name}" for finding in findings if not finding.passed]


def test_where_everything_is_right_everything_passes(examine):
    right, findings, page = examine("StandIn", golden="a_1stage")
    assert failed(findings) == []
    assert right
    assert {finding.group for finding in findings} == set(GROUPS)
    ops = {finding.name.partition(":")[0] for finding in findings if finding.group == "kernels"}
    assert len(ops) == len(fields(StepOps)) - 1 + 5  # all but its name, and those of prefill
    # Of the random model five kinds in two dtypes, of the golden one three kinds and two buckets.
    assert sum(finding.group == "steps" and "rows" in finding.name for finding in findings) >= 15
    assert any(finding.figures.get("expected_bytes_per_second") for finding in findings)
    assert "The runtime is right" in page
    assert "Captured steps beside eager ones" in page


def test_a_wrong_kernel_and_one_that_does_not_compile_hide_no_other(examine):
    right, findings, page = examine("WrongKernel", "kernels")
    wrong = failed(findings)
    assert not right
    assert {name.partition(": ")[2].partition(":")[0] for name in wrong} == {"swiglu", "descend_step", "prefill smooth"}
    assert any("apart, of numbers up to" in finding.said for finding in findings)
    assert any("RuntimeError: at 3:4: | unsupported | operand" in finding.said for finding in findings)
    assert len(findings) > 3 * len(wrong)
    assert "## Failed" in page


def test_a_kernel_that_takes_its_process_with_it_hides_no_other(examine):
    right, findings, _ = examine("Crashing", "kernels")
    assert not right
    wrong = failed(findings)
    assert {name.partition(": ")[2].partition(":")[0] for name in wrong} == {"ema_step"}
    assert all("SIGSEGV" in finding.said for finding in findings if not finding.passed)
    assert len(wrong) == sum(finding.name.startswith("ema_step") for finding in findings)
    assert findings[-1].name.startswith("prefill")
    assert len({finding.name for finding in findings}) == len(findings)


def test_after_an_illegal_access_the_rest_runs_in_a_new_process(examine):
    right, findings, _ = examine("Spoiled", "kernels")
    assert not right
    wrong = [finding for finding in findings if not finding.passed]
    assert {finding.name.partition(":")[0] for finding in wrong} == {"gated_norm_step"}
    assert all("illegal memory access" in finding.said for finding in wrong)
    assert findings[-1].name.startswith("prefill")


def test_a_kernel_that_never_ends_costs_its_group_no_more_than_its_time(examine):
    right, findings, _ = examine("Hanging", "kernels", "device", limit_seconds=12.0)
    assert not right
    assert len(failed(findings)) == 1
    assert "not done after 12 s" in next(finding.said for finding in findings if not finding.passed)
    assert findings[-1].group == "device"


def test_a_replay_that_is_not_its_step_is_found(examine):
    right, findings, _ = examine("StaleReplays", "steps")
    assert not right
    assert len(failed(findings)) > 5


def test_a_boundary_that_flips_is_found(examine):
    right, findings, _ = examine("Flipping", "flips", golden="a_1stage", text_bytes=60)
    assert not right
    wrong = [finding for finding in findings if not finding.passed]
    assert {finding.name for finding in wrong} >= {"CPU float32 against float32 step by step"}
    assert not any("in one piece" in finding.name for finding in wrong)
    assert sum(wrong[0].figures["flips"]) > 0


def test_a_row_that_depends_on_its_company_is_found(examine):
    right, findings, _ = examine("CrowdShy", "crowd", golden="a_1stage", max_graphs=12)
    assert not right
    assert "crowd: float32: a text alone and among 7 others" in failed(findings)


def test_a_step_launched_ahead_that_leaves_nobody_out_is_found(examine):
    right, findings, _ = examine("Unmasked", "overlap", golden="a_1stage", max_graphs=12, completion_bytes=40)
    assert not right
    assert failed(findings) == ["overlap: float32: rows that pause and end"]
    assert "host disagree" in findings[-1].said
    assert examine("StandIn", "overlap", golden="a_1stage", max_graphs=12, completion_bytes=40)[0]


def test_a_group_that_dies_before_its_first_check_is_told(examine):
    right, findings, _ = examine("StandIn", "flips", model="nowhere-at-all")
    assert not right
    assert [(finding.group, finding.name) for finding in findings] == [("flips", "the group")]
    assert "nowhere-at-all" in findings[0].said


def test_it_can_be_run_twice(examine):
    assert examine("StandIn", "device")[0]
    assert examine("StandIn", "device")[0]


def test_without_a_device_it_says_so_in_a_line(examine, tmp_path, monkeypatch, capfd):
    with pytest.raises(NoDevice, match="this is a test"):
        examine("Absent")
    monkeypatch.setattr(device, "CUDA", "tests.gpu.doctor_stand_ins:Absent")
    report = tmp_path / "none"
    assert main(["doctor", "--gpu", "--report", str(report)]) == 1
    assert capfd.readouterr().err == "hnet: error: no CUDA device: this is a test\n"
    assert not report.exists()


@pytest.mark.parametrize("right", [True, False])
def test_the_command_tells_findings_and_its_exit_code_is_the_verdict(right, tmp_path, monkeypatch, capfd):
    asked: list[Settings] = []

    def examined(settings: Settings, folder: Path, *, tell) -> bool:
        asked.append(settings)
        tell(Finding("kernels", "swiglu", right, "close", "1 apart"))
        return right

    monkeypatch.setattr("hnet_runtime.gpu_doctor.examination.examine_gpu", examined)
    code = main(["doctor", "demo", "--gpu", "--report", os.fspath(tmp_path), "--gpu-time-limit", "7"])
    assert code == (0 if right else 1)
    said = capfd.readouterr().out
    assert f"{'ok    ' if right else 'FAILED'} kernels: swiglu (1 apart)" in said
    assert (asked[0].model, asked[0].limit_seconds, asked[0].device) == ("demo", 7.0, device.CUDA)


def test_a_report_holds_what_json_and_tables_cannot():
    finding = Finding("flips", "a | b", False, "close", "max |Δ p|", 1.0, {"bits": [float("nan"), 1.0]})
    settings = Settings(device="none")
    assert json.loads(json.dumps(as_document(settings, [finding], "1")))["findings"][0]["figures"]["bits"] == [
        None,
        1.0,
    ]
    assert "a \\| b" in as_markdown(settings, [finding], "1")
    assert not passed([])
