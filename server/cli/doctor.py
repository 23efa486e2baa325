"""`hnet doctor`: what this machine can run, and whether it runs right."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hnet_runtime import __version__
from server.cli.loading import progress_bar
from server.cli.options import engine_options, option
from server.cli.prefill_table import prefill_lines
from server.cli.streams import write

if TYPE_CHECKING:
    from hnet_runtime.comparison import Check
    from hnet_runtime.doctor import Diagnosis, InstructionSet, Operation
    from hnet_runtime.parity import StepTime

MIB = 2**20


@click.command("doctor")
@click.argument("model", required=False, envvar="HNET_MODEL")
@engine_options
@option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
@option(
    "--gpu", is_flag=True, help="Check a GPU instead, and write a report: kernels, captured steps, boundaries, rates."
)
@option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("hnet-gpu-report"),
    help="With --gpu: the directory of the report.",
)
@option("--gpu-time-limit", type=click.FloatRange(1), default=900.0, help="With --gpu: seconds for each of six groups.")
def doctor(model: str | None, *, as_json: bool, gpu: bool, report: Path, gpu_time_limit: float, **engine: Any) -> int:
    """Report the machine, and check and time the code that would serve MODEL.

    It is checked against the reference and, where it is native, against the torch path; a text read whole against byte
    by byte, and alone against among others. The exit code is 1 if a check fails.

    With --gpu the GPU is checked instead, on MODEL in bfloat16 and float32; of the options that say how a model runs,
    only --config counts then.
    """
    if gpu:
        from server.cli.gpu_doctor import examine as examine_gpu

        return examine_gpu(model, engine["config"], report, gpu_time_limit)
    from hnet_runtime.doctor import examine

    with progress_bar(f"loading {model or 'the demo model'}") as progress:
        diagnosis = examine(model, progress=progress, **engine)
    if as_json:
        document = {"hnet": __version__, "passed": diagnosis.passed, **dataclasses.asdict(diagnosis)}
        write(json.dumps(_finite(document), indent=2) + "\n")
    else:
        write("\n".join(report_lines(diagnosis)) + "\n")
    return 0 if diagnosis.passed else 1


def report_lines(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis for reading, a finding a line."""
    machine = diagnosis.machine
    memory = f", {machine.memory / 2**30:.1f} GiB" if machine.memory else ""
    stages = ", ".join(f"stage {stage} {size / MIB:.1f}" for stage, size in enumerate(diagnosis.stage_bytes))
    weights = diagnosis.embedding_bytes + sum(diagnosis.stage_bytes)
    lines = [
        ("hnet", f"{__version__}, Python {machine.python}, PyTorch {machine.torch}"),
        ("system", machine.system),
        ("processor", f"{machine.cpu}, {machine.cores} cores{memory}"),
        ("", " ".join(machine.instruction_sets) or "no known vector instructions"),
        ("CUDA", f"built for {machine.cuda}" if machine.cuda else "PyTorch is built without it"),
        *(("", f"{gpu.name}, capability {gpu.capability}, {gpu.memory / 2**30:.1f} GiB") for gpu in machine.gpus),
        ("packages", ", ".join(f"{name} {state}" for name, state in machine.packages.items())),
        ("model", f"{diagnosis.model}, {diagnosis.parameters / 1e6:.1f}M parameters, {diagnosis.dtype}"),
        ("weights", f"{weights / MIB:.1f} MiB: embeddings {diagnosis.embedding_bytes / MIB:.1f}, {stages}"),
        ("", f"{diagnosis.served_bytes / MIB:.1f} MiB as they are served"),
        ("native", "; ".join(map(_library, diagnosis.instruction_sets))),
        ("serving", f"{diagnosis.kernels} on {diagnosis.device}, {diagnosis.threads} thread(s)"),
        *_dispatch_lines(diagnosis.dispatch),
        *prefill_lines(diagnosis.prefill_on_cuda),
        ("loading", f"{diagnosis.load_seconds:.2f} s"),
        *_step_lines(diagnosis.steps),
        *(line for check in diagnosis.checks for line in _check_lines(check, diagnosis.checked_bytes)),
        ("verdict", "the runtime is right here" if diagnosis.passed else "the runtime is NOT right here"),
    ]
    return [f"{label:<10} {text}".rstrip() for label, text in lines]


def _library(found: InstructionSet) -> str:
    if not found.runnable:
        return f"{found.name} cannot run: {found.reason}"
    return f"{found.name} {'serves' if found.serves else 'runs'}" + (f" ({found.reason})" if found.reason else "")


def _dispatch_lines(dispatch: tuple[Operation, ...]) -> list[tuple[str, str]]:
    """Operations that the same code runs, in one line."""
    together: dict[str, list[str]] = {}
    for operation in dispatch:
        together.setdefault(operation.code, []).append(operation.name)
    lines = [f"{', '.join(names)}: {code}" for code, names in together.items()]
    return [("" if index else "dispatch", line) for index, line in enumerate(lines)]


def _step_lines(steps: tuple[StepTime, ...]) -> list[tuple[str, str]]:
    lines = []
    for index, step in enumerate(steps):
        what = "stage 0 alone" if step.stage == 0 else f"down to stage {step.stage}"
        own = f"of which stage {step.stage} {1e3 * step.own_seconds:.2f}"
        lines.append(("" if index else "step", f"{what}: {1e3 * step.seconds:.2f} ms, {own} (median of {step.count})"))
    return lines


def _check_lines(check: Check, checked_bytes: int) -> list[tuple[str, str]]:
    apart = check.difference
    bitwise = apart.bitwise and check.demand == "the same bits"
    lines = [("check", f"{check.name}: {'ok' if check.passed else 'FAILED'} ({check.demand})")]
    if bitwise:
        return lines
    flips = ", ".join(f"{flips} of {count}" for flips, count in zip(apart.flips, apart.positions, strict=True))
    routers = f", max |Δ p| {apart.p_max_abs:.2g}, boundaries flipped {flips}" if flips else ""
    before, after = apart.bits_per_byte
    return [
        *lines,
        ("", f"max |Δ logit| {apart.max_abs:.2g}, rms {apart.rms:.2g}, same best byte {apart.same_argmax:.1%},"),
        ("", f"bits per byte {before:.4f} and {after:.4f}{routers}"),
    ]


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a figure is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
