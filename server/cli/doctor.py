"""`hnet doctor`: what this machine can run, and whether it runs right."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import click

from hnet_runtime import __version__
from server.cli.loading import progress_bar
from server.cli.options import engine_options, option
from server.cli.streams import write

if TYPE_CHECKING:
    from hnet_runtime.doctor import Diagnosis
    from hnet_runtime.parity import Check, StepTime

MIB = 2**20


@click.command("doctor")
@click.argument("model", required=False, envvar="HNET_MODEL")
@engine_options
@option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def doctor(model: str | None, *, as_json: bool, **engine: Any) -> int:
    """Report the machine, check the runtime against the reference on MODEL, and time its steps.

    The exit code is 1 if a check fails.
    """
    from hnet_runtime.doctor import examine

    with progress_bar(f"loading {model or 'the demo model'}") as progress:
        diagnosis = examine(model, progress=progress, **engine)
    if as_json:
        document = {"hnet": __version__, "passed": diagnosis.passed, **dataclasses.asdict(diagnosis)}
        write(json.dumps(_finite(document), indent=2) + "\n")
    else:
        write("\n".join(report(diagnosis)) + "\n")
    return 0 if diagnosis.passed else 1


def report(diagnosis: Diagnosis) -> list[str]:
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
        ("serving", f"{diagnosis.path} path on {diagnosis.device}, {diagnosis.threads} thread(s)"),
        ("loading", f"{diagnosis.load_seconds:.2f} s"),
        *_step_lines(diagnosis.steps),
        *(line for check in diagnosis.checks for line in _check_lines(check, diagnosis.checked_bytes)),
        ("verdict", "the runtime is right here" if diagnosis.passed else "the runtime is NOT right here"),
    ]
    return [f"{label:<10} {text}".rstrip() for label, text in lines]


def _step_lines(steps: tuple[StepTime, ...]) -> list[tuple[str, str]]:
    lines = []
    for index, step in enumerate(steps):
        more = f", {1e3 * (step.seconds - steps[index - 1].seconds):+.2f}" if index else ""
        what = "stage 0 alone" if step.stage == 0 else f"down to stage {step.stage}"
        lines.append(("" if index else "step", f"{what}: {1e3 * step.seconds:.2f} ms{more} (median of {step.count})"))
    return lines


def _check_lines(check: Check, checked_bytes: int) -> list[tuple[str, str]]:
    apart = check.difference
    flips = ", ".join(f"{flips} of {count}" for flips, count in zip(apart.flips, apart.positions, strict=True))
    figures = f"max |Δ logit| {apart.max_abs:.2g}, rms {apart.rms:.2g}, same best byte {apart.same_argmax:.1%}"
    return [
        ("check", f"{check.name}: {'ok' if check.passed else 'FAILED'} ({check.demand})"),
        ("", f"{checked_bytes} bytes: {figures}" + (f", boundaries flipped {flips}" if flips else "")),
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
