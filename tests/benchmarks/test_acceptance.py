"""Acceptance of a checkpoint: its steps on the demo model, with a stand-in for lm-eval; what it judges and how."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import acceptance
from benchmarks.acceptance import LAMBADA, PUBLISHED, Expectation, Figure, Outcome, expectation, markdown
from benchmarks.server_process import free_port, our_server

TEXTS = ("The ship had been three weeks at sea", "She opened the door and went into the house")
LM_EVAL = '''#!{python}
"""Stands in for lm-eval: the last words of texts, asked as it asks."""
import json, pathlib, sys, urllib.request

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
settings = dict(each.split("=", 1) for each in given["--model_args"].split(","))
texts = json.loads((pathlib.Path(given["--include_path"]) / "texts.json").read_text())
right, nats = 0, 0.0
for text in texts:
    before = text.rpartition(" ")[0]
    tokens = [254, *text.encode()]
    body = {{"model": settings["model"], "prompt": tokens, "max_tokens": 1, "logprobs": 1, "echo": True}}
    request = urllib.request.Request(settings["base_url"], json.dumps(body).encode())
    found = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["logprobs"]
    answer = slice(1 + len(before.encode()), len(tokens))
    nats -= sum(found["token_logprobs"][answer])
    best = [max(top, key=top.get) for top in found["top_logprobs"][answer]]
    right += best == found["tokens"][answer]
place = pathlib.Path(given["--output_path"]) / settings["model"]
place.mkdir(parents=True, exist_ok=True)
results = {{"acc,none": right / len(texts), "perplexity,none": 2.718281828 ** (nats / len(texts))}}
(place / "results_now.json").write_text(json.dumps({{"results": {{given["--tasks"]: results}}}}))
'''


@pytest.fixture(scope="module")
def server():
    with our_server("demo", free_port()) as running:
        running.wait(120)
        yield running


@pytest.fixture
def lm_eval(tmp_path) -> Path:
    """The Python beside a stand-in, which reads texts.json of --include_path."""
    folder = tmp_path / "lm-eval" / "bin"
    folder.mkdir(parents=True)
    program = folder / "lm_eval"
    program.write_text(LM_EVAL.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    return folder / "python"


def accept(server, tmp_path, *arguments: object) -> tuple[int, dict[str, dict[str, object]], str]:
    """Exit code, steps by name, and the page."""
    report = tmp_path / "report"
    command = ["demo", "--url", f"http://127.0.0.1:{server.port}", "--report", report, "--folder", tmp_path / "tools"]
    code = 0
    try:
        acceptance.main([str(each) for each in (*command, "--minutes", 2, *arguments)])
    except SystemExit as ended:
        code = int(str(ended.code))
    document = json.loads((report / "acceptance.json").read_text(encoding="utf-8"))
    assert document["passed"] == (code == 0)
    return code, {step["step"]: step for step in document["steps"]}, (report / "acceptance.md").read_text("utf-8")


def test_all_steps_on_the_demo_model(server, tmp_path, lm_eval):
    texts = [*TEXTS, _greedy(server.port, "It was the first day of the")]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    sample = tmp_path / "sample.txt"
    sample.write_text(" ".join(TEXTS) * 40, encoding="utf-8")
    code, steps, page = accept(
        *(server, tmp_path, "--lm-eval", lm_eval, "--include-path", tmp_path, "--task", "last_words"),
        *("--text", sample, "--expect", "bits per byte=2±2", "--expect", f"{LAMBADA}=50±45"),
        *("--peer-url", f"http://127.0.0.1:{server.port}", "--peer-model", "demo"),
    )
    assert code == 0, page
    status = {name: step["status"] for name, step in steps.items()}
    expected = {"serve": "passed", "crowd": "passed", "lambada": "passed", "text": "passed", "peer": "recorded"}
    assert status == {"doctor": "skipped", **expected}
    figures = {figure["name"]: figure["value"] for step in steps.values() for figure in step["figures"]}
    # The last text ends as the model would have it.
    assert figures[LAMBADA] > 33
    assert 1 < figures["bits per byte"] < 4
    assert 2 < figures["bytes per chunk, stage 1"] < 12
    assert figures["ours, 8 streams"] > 0
    assert all(name in page for name in figures)


def test_a_figure_far_from_what_is_reported_fails(server, tmp_path):
    sample = tmp_path / "sample.txt"
    sample.write_text(TEXTS[0] * 20, encoding="utf-8")
    code, steps, page = accept(server, tmp_path, "--only", "text", "--text", sample, "--expect", "bits per byte=0.001")
    assert code == 1
    assert set(steps) == {"serve", "text"}
    assert (steps["serve"]["status"], steps["text"]["status"]) == ("passed", "failed")
    assert "0.001 ± 3e-05" in page


def test_bytes_that_are_no_text_to_the_model_fail(server, tmp_path):
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(32)) * 40)
    code, steps, _ = accept(server, tmp_path, "--only", "text", "--text", noise)
    assert code == 1
    assert "bits per byte, and its bytes counted one by one give 5.000" in str(steps["text"]["said"])


def test_a_part_of_the_passages_is_held_against_nothing(server, tmp_path, lm_eval):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    options = ("--only", "lambada", "--lm-eval", lm_eval, "--include-path", tmp_path, "--limit", 2)
    code, steps, _ = accept(server, tmp_path, *options, "--expect", f"{LAMBADA}=1000±1")
    assert code == 0
    assert steps["lambada"]["status"] == "recorded"
    assert "--limit 2" in str(steps["lambada"]["command"])


def test_a_step_that_breaks_fails_alone(server, tmp_path, lm_eval):
    broken = lm_eval.with_name("lm_eval")
    broken.write_text("#!/bin/sh\necho no such task >&2\nexit 3\n", encoding="utf-8")
    code, steps, _ = accept(server, tmp_path, "--lm-eval", lm_eval, "--only", "lambada", "--only", "text")
    assert code == 1
    assert steps["lambada"]["status"] == "failed"
    assert "no such task" in str(steps["lambada"]["said"])
    assert steps["text"]["status"] == "skipped"
    assert "--text FILE" in str(steps["text"]["said"])


def test_without_a_server_steps_say_what_they_lack(tmp_path):
    class Nobody:
        port = free_port()

    code, steps, _ = accept(Nobody, tmp_path, "--only", "crowd")
    assert code == 1
    assert (steps["serve"]["status"], steps["crowd"]["status"]) == ("failed", "skipped")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_its_doctor_fails_the_acceptance(tmp_path):
    with pytest.raises(SystemExit):
        acceptance.main(["demo", "--only", "doctor", "--report", str(tmp_path)])
    (doctor,) = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))["steps"]
    assert doctor["status"] == "failed"
    assert "no CUDA device" in doctor["said"]
    assert doctor["command"].startswith("hnet doctor --gpu --report ")


def test_only_servers_of_this_machine_are_asked(tmp_path):
    with pytest.raises(SystemExit):
        acceptance.main(["demo", "--url", "http://192.0.2.1:8000", "--only", "crowd", "--report", str(tmp_path)])
    (serve, _) = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))["steps"]
    assert "a server on this machine is wanted" in serve["said"]


def test_what_is_published_is_met_within_its_tolerance():
    expected = PUBLISHED["hnet_1stage_XL"][LAMBADA]
    assert Figure(LAMBADA, 48.5, "%", expected).passed
    assert Figure(LAMBADA, 47.1, "%", expected).passed
    assert not Figure(LAMBADA, 46.0, "%", expected).passed
    assert Figure(LAMBADA, 3.0, "%").passed


def test_expectations_of_ones_own():
    assert expectation("bits per byte=0.8±0.02") == ("bits per byte", Expectation(0.8, 0.02, "--expect"))
    assert expectation("x=10")[1].tolerance == pytest.approx(0.3)
    for wrong in ("x", "x=", "x=1±much"):
        with pytest.raises(argparse.ArgumentTypeError):
            expectation(wrong)


def test_a_page_keeps_its_table_whatever_was_said():
    outcome = Outcome("text", "checks", "failed", said="one | two\nthree")
    assert "one \\| two three |" in markdown("demo", [outcome])


def _greedy(port: int, before: str) -> str:
    """The words and the next one as the model would have it."""
    body = {"prompt": before, "max_tokens": 12, "temperature": 0}
    after: str = acceptance._ask(port, "/v1/completions", body)["choices"][0]["text"]
    assert after.startswith(" ")
    return before + " " + after.split()[0]
