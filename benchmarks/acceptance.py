"""A published checkpoint on a machine, end to end: does it run right there, and does it say what its authors report?

    hnet bench acceptance MODEL [--url URL] [--text FILE] [--peer-url URL --peer-model NAME] [--only STEP]

Steps, each bounded in time: `doctor` (hnet doctor --gpu), `serve`, `crowd` (the same bytes alone and among others),
`lambada` (lm-eval, which fetches its data itself), `text` (bits per byte and bytes per chunk of a file), `peer` (bytes
of text a second beside another OpenAI-compatible server). acceptance.json and acceptance.md are written to --report,
and the exit code is 1 if a step fails. docs/acceptance.md says what to expect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from benchmarks.byte_tokenizer import BOS
from benchmarks.clients import LM_EVAL, run_lm_eval
from benchmarks.http_load import Load, run_streams
from benchmarks.peers import environment
from benchmarks.report import commit, machine, print_table
from benchmarks.server_process import free_port, our_server

STREAMS, NEW_BYTES, PIECE = 8, 256, 2000
PROMPTS = (
    "The ship had been three weeks at sea when ",
    "def fibonacci(n):\n    ",
    "In the year 1848 the ",
    "“Come in,” said the old man, ",
)


@dataclass(frozen=True)
class Expectation:
    """A figure that somebody reports, and how far from it ours may be."""

    value: float
    tolerance: float
    source: str


@dataclass(frozen=True)
class Figure:
    """What a step found. Without an expectation it is recorded and judged by nobody."""

    name: str
    value: float
    unit: str
    expected: Expectation | None = None

    @property
    def passed(self) -> bool:
        return self.expected is None or abs(self.value - self.expected.value) <= self.expected.tolerance


@dataclass(frozen=True)
class Outcome:
    """status: `recorded` says that the step ran and nothing is known to hold its figures against."""

    step: str
    checks: str
    status: Literal["passed", "failed", "recorded", "skipped"]
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    said: str = ""
    command: str = ""


class Skipped(Exception):
    """A step that cannot run here; the message says what it lacks."""


LAMBADA = "LAMBADA accuracy"
PUBLISHED: dict[str, dict[str, Expectation]] = {
    # 5153 passages: 0.7 points of standard error; two of them either way.
    "hnet_1stage_XL": {LAMBADA: Expectation(48.5, 1.5, "about what is reported of it")},
}
"""By checkpoint. The tables of arXiv 2507.07955 are not transcribed: --expect gives what you read there."""


class Acceptance:
    """A model and, from the step `serve` on, a server of it."""

    def __init__(self, options: argparse.Namespace, servers: ExitStack) -> None:
        self.options, self._servers = options, servers
        self.model: str = options.model
        self.port: int | None = None
        self.served = ""
        self.command = ""  # of the step that runs
        self._expected = {**PUBLISHED.get(Path(self.model).stem, {}), **options.expect}

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────

    def doctor(self) -> list[Figure]:
        """Kernels, captured steps, boundaries and rates of this GPU (hnet doctor --gpu)"""
        if self.options.url:
            raise Skipped("--url: a server has the GPU; run `hnet doctor --gpu` before it starts")
        report = self.options.report / "doctor"
        command = [sys.executable, "-m", "server.cli.main", "doctor", "--gpu", "--report", str(report)]
        command += [] if self.model == "demo" else [self.model]
        self.command = "hnet " + " ".join(command[3:])
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * self.options.minutes, check=False, errors="replace"
        )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
        return []

    def serve(self) -> list[Figure]:
        """The server starts, is ready and names the model"""
        began = time.perf_counter()
        if self.options.url:
            place = urlsplit(self.options.url)
            if place.hostname not in ("127.0.0.1", "localhost"):
                raise RuntimeError(f"--url {self.options.url}: a server on this machine is wanted")
            port = place.port or 80
        else:
            port = free_port()
            arguments = ("--max-model-len", "8192")
            self.command = f"hnet serve {self.model} --port {port} {' '.join(arguments)}"
            server = self._servers.enter_context(our_server(self.model, port, *arguments))
            server.wait(60 * self.options.minutes)
        (model, *_) = _ask(port, "/v1/models")["data"]
        self.port, self.served = port, model["id"]
        return [Figure("ready", time.perf_counter() - began, "s")]

    def crowd(self) -> list[Figure]:
        """Greedy bytes of a prompt are the same alone and among others"""

        def complete(prompt: str) -> str:
            body = {"model": self.served, "prompt": prompt, "max_tokens": 128, "temperature": 0}
            text: str = _ask(self._port(), "/v1/completions", body)["choices"][0]["text"]
            return text

        alone = [complete(prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(4 * len(PROMPTS)) as pool:
            among = list(pool.map(complete, PROMPTS * 4))
        other = sum(text != alone[index % len(PROMPTS)] for index, text in enumerate(among))
        return [Figure("answers other than alone", other, f"of {len(among)}", Expectation(0, 0, "one row, one truth"))]

    def lambada(self) -> list[Figure]:
        """lm-eval's LAMBADA through /v1/completions, and what is reported"""
        options = self.options
        python = options.lm_eval or environment(options.folder / "lm-eval", LM_EVAL)
        output = options.report / "lambada" / "results"
        output.mkdir(parents=True, exist_ok=True)
        arguments: list[object] = [] if options.include_path is None else ["--include_path", options.include_path]
        arguments += [] if options.limit is None else ["--limit", options.limit]
        self.command = (
            f"lm_eval --model local-completions --tasks {options.task} {' '.join(map(str, arguments))}".strip()
        )
        offline = str(int(options.offline))
        variables = {"HF_HUB_OFFLINE": offline, "HF_DATASETS_OFFLINE": offline}
        results = run_lm_eval(
            python, self._port(), self.served, options.task, output, arguments, variables, 60 * options.minutes
        )
        # A part of the passages says too little to be held against all of them.
        judged = options.limit is None
        found = [self._figure(LAMBADA, 100 * results["acc,none"], "%", judged)]
        if "perplexity,none" in results:
            found.append(self._figure("LAMBADA perplexity", results["perplexity,none"], "a word", judged))
        return found

    def text(self) -> list[Figure]:
        """Bits per byte and bytes per chunk of a text"""
        if self.options.text is None:
            raise Skipped("--text FILE: a text of the kind that the checkpoint was trained on")
        data = self.options.text.read_bytes()[: self.options.text_bytes]
        if len(data) < 2:
            raise RuntimeError(f"{self.options.text} holds {len(data)} bytes")
        nats, scored, chunks = 0.0, 0, Counter[int]()
        for begin in range(0, len(data), PIECE):
            piece = {"model": self.served, "input": [BOS, *data[begin : begin + PIECE]]}
            logprobs = _ask(self._port(), "/v1/score", piece)["logprobs"][1:]
            nats -= sum(logprobs)
            scored += len(logprobs)
            for stage in _ask(self._port(), "/v1/segment", piece)["stages"]:
                chunks[stage["stage"]] += len(stage["boundaries"])
        bits = nats / scored / math.log(2)
        counts = Counter(data)
        entropy = -sum(count / len(data) * math.log2(count / len(data)) for count in counts.values())
        if not bits < entropy:
            raise RuntimeError(f"{bits:.3f} bits per byte, and its bytes counted one by one give {entropy:.3f}")
        pieces = -(-len(data) // PIECE)
        return [
            self._figure("bits per byte", bits, "bits"),
            *(
                self._figure(f"bytes per chunk, stage {stage}", (len(data) + pieces) / count, "bytes")
                for stage, count in sorted(chunks.items())
            ),
        ]

    def peer(self) -> list[Figure]:
        """Bytes of completions a second, ours and another server's tokens beside them"""
        options = self.options
        if options.peer_url is None:
            raise Skipped("--peer-url and --peer-model: another OpenAI-compatible server on this machine")
        place = urlsplit(options.peer_url)
        if place.hostname not in ("127.0.0.1", "localhost") or place.port is None or not options.peer_model:
            raise RuntimeError(f"--peer-url {options.peer_url}: a port of this machine is wanted, and --peer-model")
        prompts = [PROMPTS[index % len(PROMPTS)].encode() for index in range(STREAMS)]
        best: dict[str, Load] = {}
        for _ in range(2):  # in turn; the better of two
            for name, port, peer in (("ours", self._port(), None), ("theirs", place.port, options.peer_model)):
                load = asyncio.run(asyncio.wait_for(run_streams(port, prompts, NEW_BYTES, peer), 60 * options.minutes))
                best[name] = min(best.get(name, load), load, key=lambda each: each.seconds)
        rate, theirs = (best[name].generated / best[name].seconds for name in ("ours", "theirs"))
        return [
            Figure(f"ours, {STREAMS} streams", rate, "bytes/s"),
            Figure(f"{options.peer_model}, {STREAMS} streams", theirs, "tokens/s"),
            Figure("bytes a token at which both are as fast", rate / theirs, "bytes"),
            Figure("ours, median first byte", 1e3 * best["ours"].first, "ms"),
            Figure(f"{options.peer_model}, median first token", 1e3 * best["theirs"].first, "ms"),
        ]

    # ── what they share ───────────────────────────────────────────────────────────────────────────

    def _port(self) -> int:
        if self.port is None:
            raise Skipped("no server: see the step `serve`")
        return self.port

    def _figure(self, name: str, value: float, unit: str, judged: bool = True) -> Figure:
        return Figure(name, value, unit, self._expected.get(name) if judged else None)


STEPS: dict[str, Callable[[Acceptance], list[Figure]]] = {
    "doctor": Acceptance.doctor,
    "serve": Acceptance.serve,
    "crowd": Acceptance.crowd,
    "lambada": Acceptance.lambada,
    "text": Acceptance.text,
    "peer": Acceptance.peer,
}
JUDGED_BY_ITSELF = frozenset({"doctor", "serve"})  # what they find is an exit code and an answer


def run(options: argparse.Namespace) -> list[Outcome]:
    """Every step that is asked for, whatever those before it gave."""
    outcomes = []
    chosen = set(options.only or STEPS)
    if chosen != {"doctor"}:
        chosen.add("serve")
    with ExitStack() as servers:
        acceptance = Acceptance(options, servers)
        for name, step in STEPS.items():
            if name not in chosen:
                continue
            print(f"{name} …", flush=True)
            outcomes.append(_outcome(acceptance, name, step))
            print(f"{name}: {outcomes[-1].status} {outcomes[-1].said}".rstrip(), flush=True)
    return outcomes


def _outcome(acceptance: Acceptance, name: str, step: Callable[[Acceptance], list[Figure]]) -> Outcome:
    began, acceptance.command = time.perf_counter(), ""
    outcome = Outcome(name, step.__doc__ or "", "failed")
    try:
        figures = tuple(step(acceptance))
    except Skipped as lacking:
        outcome = replace(outcome, status="skipped", said=str(lacking))
    except (RuntimeError, OSError, ValueError, KeyError, TimeoutError, subprocess.SubprocessError) as error:
        outcome = replace(outcome, said=f"{type(error).__name__}: {error}")
    else:
        judged = name in JUDGED_BY_ITSELF or any(figure.expected for figure in figures)
        status: Literal["passed", "failed", "recorded"] = "passed" if judged else "recorded"
        if not all(figure.passed for figure in figures):
            status = "failed"
        outcome = replace(outcome, status=status, figures=figures)
    return replace(outcome, seconds=time.perf_counter() - began, command=acceptance.command)


def _ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refusal:
        raise RuntimeError(f"{path} answered {refusal.code}: {refusal.read().decode(errors='replace')[:300]}") from None


# ── the report ────────────────────────────────────────────────────────────────────────────────


def document(model: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """acceptance.json."""
    return {
        "model": model,
        "commit": commit(),
        "machine": machine(),
        "passed": not any(outcome.status == "failed" for outcome in outcomes),
        "steps": [asdict(outcome) for outcome in outcomes],
    }


def markdown(model: str, outcomes: Sequence[Outcome]) -> str:
    """acceptance.md."""
    words = machine()
    lines = [
        f"# Acceptance of {model}",
        "",
        f"On {words['processor']}, torch {words['torch']}, at commit {commit()}.",
        "",
        "| step | checks | result | s | said |",
        "|---|---|---|---|---|",
    ]
    for each in outcomes:
        said = " ".join(each.said.split()).replace("|", "\\|")
        lines.append(f"| {each.step} | {each.checks} | {each.status} | {each.seconds:.1f} | {said} |")
    lines += ["", "| figure | found | unit | expected | source | result |", "|---|---|---|---|---|---|"]
    for figure in (figure for each in outcomes for figure in each.figures):
        expected, source, verdict = "", "", "recorded"
        if figure.expected is not None:
            expected = f"{figure.expected.value:g} ± {figure.expected.tolerance:g}"
            source, verdict = figure.expected.source, "passed" if figure.passed else "failed"
        lines.append(f"| {figure.name} | {figure.value:.4g} | {figure.unit} | {expected} | {source} | {verdict} |")
    commands = [f"- {each.step}: `{each.command}`" for each in outcomes if each.command]
    return "\n".join([*lines, "", *commands]).rstrip() + "\n"


def expectation(given: str) -> tuple[str, Expectation]:
    """`bits per byte=0.8` or `bits per byte=0.8±0.02`; without a tolerance, three hundredths of it."""
    name, _, wanted = given.partition("=")
    value, _, tolerance = wanted.partition("±")
    try:
        number = float(value)
        return name, Expectation(number, float(tolerance) if tolerance else 0.03 * abs(number), "--expect")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not FIGURE=VALUE or FIGURE=VALUE±TOLERANCE") from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="what `hnet serve` takes: a checkpoint, a hub id, demo")
    parser.add_argument("--url", help="of a server of MODEL on this machine, instead of starting one")
    parser.add_argument(
        "--only",
        choices=STEPS,
        action="append",
        help="may be given again; all but `doctor` need `serve`, which is run for them",
    )
    parser.add_argument("--task", default="lambada_openai", help="of lm-eval")
    parser.add_argument("--include-path", type=Path, help="of lm-eval: where tasks of your own are")
    parser.add_argument("--limit", type=int, help="of lm-eval: only so many passages, which judges nothing")
    parser.add_argument("--lm-eval", type=Path, help="the Python of an environment with lm-eval; made if not given")
    parser.add_argument("--offline", action="store_true", help="lm-eval finds its data in its cache")
    parser.add_argument("--text", type=Path, help="a text for bits per byte and bytes per chunk")
    parser.add_argument("--text-bytes", type=int, default=100_000, help="of it, at most")
    parser.add_argument("--peer-url", help="of another OpenAI-compatible server on this machine")
    parser.add_argument("--peer-model", help="its model")
    parser.add_argument(
        "--expect",
        type=expectation,
        action="append",
        default=[],
        help="'bits per byte=VALUE±TOLERANCE'; again for more",
    )
    parser.add_argument("--minutes", type=float, default=120, help="that a step takes at most")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "build" / "ecosystem")
    parser.add_argument("--report", type=Path, default=Path("hnet-acceptance"), help="folder of the reports")
    options = parser.parse_args(arguments)
    options.expect = dict(options.expect)
    options.folder, options.report = options.folder.resolve(), options.report.resolve()
    for folder in (options.folder, options.report):
        folder.mkdir(parents=True, exist_ok=True)
    outcomes = run(options)
    written = document(options.model, outcomes)
    (options.report / "acceptance.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    (options.report / "acceptance.md").write_text(markdown(options.model, outcomes), encoding="utf-8")
    print_table(
        f"acceptance of {options.model}",
        ["step", "result", "s", "figures"],
        [
            [
                each.step,
                each.status,
                f"{each.seconds:.1f}",
                ", ".join(f"{figure.name} {figure.value:.4g} {figure.unit}" for figure in each.figures)
                or each.said[:60],
            ]
            for each in outcomes
        ],
    )
    print(f"written to {options.report}")
    if not written["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
