"""Tools that others wrote, unmodified, against our server: do they run, and do their numbers agree with the server's?

    hnet bench clients [--only lm-eval] [--only vllm] [--only guidellm] [--report docs/ecosystem.md] [--json FILE]

lm-eval scores answers of a task made here, and /v1/score scores the same bytes. `vllm bench serve` and guidellm count
and time what they got, and /metrics says what was sent. Each tool has an environment of its own below --folder
(build/ecosystem), made on first use; the tokenizer of all is loadtests/byte-tokenizer. They run on the demo model and
reach the loopback only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.byte_tokenizer import BOS
from benchmarks.byte_tokenizer import FOLDER as TOKENIZER
from benchmarks.peers import OFFLINE, TORN_OUT, VLLM, environment
from benchmarks.report import Row, finish, measured, print_table, rows_in_markdown, write_part
from benchmarks.server_process import free_port, our_server

LM_EVAL = ("lm-eval[api]==0.4.13", "transformers")
GUIDELLM = ("guidellm==0.8.1", "torch==2.13.0")
REQUESTS, STREAMS, PROMPT_BYTES, NEW_BYTES = 32, 8, 128, 64
QUESTIONS = (  # what came before, what may follow, which of it is meant
    ("The ship had been three weeks at", (" sea", " bread", " seven"), 0),
    ("She opened the door and went into the", (" house", " cloud", " went"), 0),
    ("It was the first day of the", (" of", " year", " spoon"), 1),
    ("He took off his", (" hat and coat", " hut and goat", " his and his"), 0),
    ("In the evening the men sat round the", (" fire", " fires of", " fly"), 0),
    ("The café in the Rue de la Paix was", (" open", " naïve", " 開"), 0),
    ("“Come in,” said the old", (" man.", " mæn.", " mat."), 0),
    ("They waited until the sun had", (" risen", " raisin", " rise"), 0),
)


def lm_eval(folder: Path, port: int) -> list[Row]:
    """Log-likelihoods through echo and logprobs, and how far they are from those of /v1/score."""
    python = environment(folder / "lm-eval", LM_EVAL)
    task = folder / "lm-eval-task"
    _write_task(task)
    options = ("--include_path", task, "--log_samples")
    variables = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(task / "cache")}
    results = run_lm_eval(python, port, "demo", "hnet_bytes", task / "results", options, variables)
    (samples,) = task.glob("results/**/samples_*.jsonl")
    scored, worst = 0, 0.0
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for asked, found in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            worst = max(worst, abs(float(found[0]) - _score(port, asked["arg_0"], asked["arg_1"])))
            scored += 1
    return [
        Row("lm-eval answers scored", scored, "answers"),
        Row("lm-eval farthest from /v1/score", worst, "nats"),
        Row("lm-eval accuracy", results["acc,none"], "of 1"),
    ]


def run_lm_eval(
    python: Path,
    port: int,
    model: str,
    task: str,
    output: Path,
    options: Sequence[object] = (),
    variables: Mapping[str, str] | None = None,
    seconds: float = 600,
) -> dict[str, float]:
    """The results of one task by lm-eval (the one beside `python`), through echo and logprobs. What it writes goes to
    `output`, and what it says to log.txt beside that. Raises RuntimeError if it fails."""
    for old in output.glob("**/*.json*"):
        old.unlink()
    endpoint = f"model={model},base_url=http://127.0.0.1:{port}/v1/completions"
    settings = f"{endpoint},tokenizer={TOKENIZER},add_bos_token=True,num_concurrent=4"
    command = [python.parent / "lm_eval", "--model", "local-completions", "--model_args", settings]
    command += ["--tasks", task, "--output_path", output, *options]
    run_tool(command, output.with_name("log.txt"), seconds, **(variables or {}))
    (document,) = output.glob("**/results_*.json")
    results: dict[str, float] = json.loads(document.read_text(encoding="utf-8"))["results"][task]
    return results


def _write_task(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    lines = [json.dumps({"before": before, "after": after, "meant": meant}) for before, after, meant in QUESTIONS]
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {
        "task": "hnet_bytes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "{{after}}",
        "doc_to_target": "meant",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "hnet_bytes.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")  # JSON is YAML as well


def _score(port: int, before: str, after: str) -> float:
    """Log-probability of `after` as /v1/score has it."""
    data = [BOS, *(before + after).encode()]
    body = json.dumps({"input": data}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/score", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        logprobs: list[float] = json.load(answer)["logprobs"]
    return sum(logprobs[-len(after.encode()) :])


def vllm_bench(folder: Path, port: int) -> list[Row]:
    """What `vllm bench serve` counts and times, with random bytes as prompts."""
    python = environment(folder / "vllm", VLLM, TORN_OUT)
    result = folder / "vllm-bench.json"
    command = [python.parent / "vllm", "bench", "serve", "--backend", "openai", "--model", "demo"]
    command += ["--base-url", f"http://127.0.0.1:{port}", "--tokenizer", TOKENIZER]
    command += ["--dataset-name", "random", "--random-input-len", PROMPT_BYTES, "--random-output-len", NEW_BYTES]
    command += ["--num-prompts", REQUESTS, "--max-concurrency", STREAMS, "--ignore-eos", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", result.parent, "--result-filename", result.name]
    before = _counters(port)
    run_tool(command, folder / "vllm-bench.txt")
    found = json.loads(result.read_text(encoding="utf-8"))
    counted = {"requests": found["completed"], "prompt bytes": found["total_input_tokens"]}
    counted["new bytes"] = found["total_output_tokens"]
    name = "vllm bench serve"
    return [
        *_agreement(name, counted, before, _counters(port)),
        Row(f"{name} rate streams={STREAMS}", found["output_throughput"], "bytes/s"),
        Row(f"{name} median first byte", found["median_ttft_ms"], "ms"),
        Row(f"{name} median time per byte", found["median_tpot_ms"], "ms"),
    ]


def guidellm(folder: Path, port: int) -> list[Row]:
    """What guidellm counts and times, with texts that it makes."""
    python = environment(folder / "guidellm", GUIDELLM)
    result = folder / "guidellm.json"
    backend = f"kind=openai_http,target=http://127.0.0.1:{port},model=demo,request_format=/v1/completions"
    command = [python.parent / "guidellm", "run", "--backend", backend, "--disable-console-interactive"]
    command += ["--profile", f"kind=concurrent,streams={STREAMS}"]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={TOKENIZER}", "--output", f"kind=json,path={result}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_BYTES},output_tokens={NEW_BYTES}"]
    before = _counters(port)
    run_tool(command, folder / "guidellm.txt")
    found = json.loads(result.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    totals = {
        name: int(found[name]["successful"]["total_sum"]) for name in ("prompt_token_count", "output_token_count")
    }
    counted = {"requests": found["request_totals"]["successful"], "prompt bytes": totals["prompt_token_count"]}
    counted["new bytes"] = totals["output_token_count"]
    return [
        *_agreement("guidellm", counted, before, _counters(port)),
        Row(f"guidellm rate streams={STREAMS}", found["output_tokens_per_second"]["successful"]["mean"], "bytes/s"),
        Row("guidellm median first byte", found["time_to_first_token_ms"]["successful"]["median"], "ms"),
        Row("guidellm median between bytes", found["inter_token_latency_ms"]["successful"]["median"], "ms"),
    ]


_COUNTERS = {  # the tools' counts → the server's
    "requests": 'hnet_request_finished_total{reason="length"}',
    "prompt bytes": "hnet_request_prompt_bytes_sum",
    "new bytes": "hnet_generation_bytes_total",
}


def _counters(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        samples = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[:1] != "#")
    return {name: int(float(samples[metric])) for name, metric in _COUNTERS.items()}


def _agreement(tool: str, counted: Mapping[str, int], before: Mapping[str, int], after: Mapping[str, int]) -> list[Row]:
    """What the tool counted beside what the server counted meanwhile: a ratio of 1 where they agree."""
    rows = []
    for what, count in counted.items():
        ours = after[what] - before[what]
        rows += [
            Row(f"{tool} {what}, by the server", ours, "counted"),
            Row(f"{tool} {what}", count, "counted", f"{tool} {what}, by the server", count / ours),
        ]
    return rows


def run_tool(command: Sequence[object], log: Path, seconds: float = 600, **variables: str) -> None:
    """Runs a tool to its end; RuntimeError with the end of what it said if it fails or takes longer."""
    environment = {**os.environ, **OFFLINE, **variables}
    with open(log, "wb") as output:
        try:
            done = subprocess.run(
                [str(part) for part in command],
                env=environment,
                stdout=output,
                stderr=output,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} took more than {seconds:.0f} s: see {log}") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n" + log.read_text(encoding="utf-8", errors="replace")[-2000:])


TOOLS: dict[str, tuple[Callable[[Path, int], list[Row]], tuple[str, ...]]] = {
    "lm-eval": (lm_eval, LM_EVAL),
    "vllm": (vllm_bench, VLLM),
    "guidellm": (guidellm, GUIDELLM),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=TOOLS, action="append", help="may be given again")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "build" / "ecosystem")
    parser.add_argument(
        "--report", type=Path, help="also write the part of a page of Markdown that is about these tools"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    chosen = options.only or list(TOOLS)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with our_server("demo", free_port()) as server:
        server.wait()
        for name in chosen:
            rows += TOOLS[name][0](folder, server.port)
    table = [[row.name, f"{row.value:.4g}", row.unit, "" if row.ratio is None else f"{row.ratio:.3f}"] for row in rows]
    print_table("others' tools on the demo model", ["what", "figure", "unit", "ratio to the server's"], table)
    finish("clients", rows, options.json)
    if options.report:
        packages = ", ".join(package for name in chosen for package in TOOLS[name][1])
        command = " ".join(["hnet bench clients", *(f"--only {name}" for name in options.only or ())])
        said = f"{measured(command)} Demo model; a busy machine: the counts are what to read, the times are "
        said += "the tools' own."
        lines = [said, "", f"Tools: {packages}.", "", *rows_in_markdown(rows)]
        write_part(options.report, "Tools of others on our server", lines)


if __name__ == "__main__":
    main()
