"""One process of a run: its share of every step, and where it is the first, what is said and written.

Knows the loop: step, log, evaluate, keep. Several processes hold the same parameters and sum their gradients, so each
makes the same step; the first alone evaluates, exports and writes states. The sum also carries whether anybody has been
told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE, ModelConfig, tensor_shapes
from training import checkpoint
from training.checkpoint import Counters, State, StateError
from training.export import export
from training.forward import TrainableHNet
from training.initial import initial_parameters
from training.journal import Journal
from training.liveness import Liveness, measure
from training.losses import losses
from training.optimizer import clip, network_of, parameter_groups, rate_at
from training.plots import draw
from training.samples import write_samples
from training.settings import TrainingSettings
from training.tokens import texts_of_tokens
from training.windows import Text, Windows


@dataclass(frozen=True)
class Job:
    """folder: of the run: states, journal, export. rendezvous: a file where processes meet; unused where there is
    one."""

    settings: TrainingSettings
    config: ModelConfig
    folder: Path
    rendezvous: Path
    accept_changes: bool = False
    until: int | None = None
    """Stop, with a state written, once so many bytes have been seen; None is the schedule's end."""


class Worker:
    """Builds the model and goes on from the newest state below the run's folder. Raises StateError where it cannot."""

    def __init__(self, job: Job, rank: int, say: Callable[[str], None]) -> None:
        self._job, self._rank, self._say = job, rank, say
        settings, config = job.settings, job.config
        self._first = rank == 0
        state = checkpoint.newest(job.folder / "states")
        train, self._heldout = self._texts()
        self._lengths = None if settings.vocabulary is None else torch.from_numpy(train.lengths)
        self._data = Windows(train, settings.data.window, settings.seed)
        vocabulary = settings.vocabulary or VOCAB_SIZE
        values = initial_parameters(config, settings.seed, vocabulary) if state is None else state.parameters
        # In one order whatever file they came from: sums over all of them are part of a curve.
        self._parameters = {key: values[key].clone().requires_grad_() for key in tensor_shapes(config)}
        self._sum = _bind_gradients(self._parameters)
        self._networks = network_of(config)
        self._optimizer = torch.optim.AdamW(
            parameter_groups(config, self._parameters, settings.optimizer), betas=settings.optimizer.betas, fused=True
        )
        self._counters = Counters(0, 0, 0.0, settings_of_curve(settings))
        if state is not None:
            check_settings(job, state)
            checkpoint.restore_moments(self._optimizer, state.moments)
            self._counters = _replace(state.counters, settings=self._counters.settings)
        self._model = TrainableHNet(config, self._parameters)
        self._stopping = False
        self._parent = os.getppid()

    def _texts(self) -> tuple[Text, Text]:
        settings = self._job.settings
        if settings.vocabulary is None:
            return Text.of_bytes(settings.data.train), Text.of_bytes(settings.data.heldout)
        folder = self._job.folder / "tokens"
        return texts_of_tokens(settings.data.train, settings.data.heldout, settings.vocabulary, folder)

    def stop(self, *_: Any) -> None:
        """Ends the run after the step under way, with a state written."""
        self._stopping = True

    def run(self) -> bool:
        """Steps until the schedule ends; returns whether it did, rather than being told to stop."""
        settings, reporting = self._job.settings, self._job.settings.reporting
        end = min(settings.schedule.total, self._job.until or settings.schedule.total)
        journal = Journal(self._job.folder, self._counters, end, reporting.log, self._say) if self._first else None
        kept = began = time.monotonic()
        before = self._counters.seconds
        while self._counters.seen < end:
            step = self._step()
            last, stopped = self._counters.seen >= end, step.stopped
            now = time.monotonic()
            self._counters = _replace(self._counters, seconds=before + now - began)
            if journal is not None:
                journal.step(self._counters, step.figures)
                if last or _passed(self._counters.seen, step.bytes, reporting.evaluate):
                    journal.evaluation(self._counters, self._evaluate())
                    self._show()
                if last or stopped or now - kept > reporting.checkpoint:
                    self._keep()
                    kept = now
            if stopped:
                return False
        return True

    def _step(self) -> _Step:
        settings, batch = self._job.settings, self._job.settings.batch
        share = batch.windows // batch.processes
        rounds = share // batch.micro
        self._sum.zero_()
        bits, chunks = 0.0, [0.0] * self._job.config.num_routed_stages
        for turn in range(rounds):
            first = self._counters.step * batch.windows + self._rank * share + turn * batch.micro
            windows, targets = self._data.batch(first, batch.micro)
            with torch.autocast("cpu", torch.bfloat16, enabled=batch.bf16):
                forwarded = self._model.forward(windows)
            found = losses(forwarded, windows, targets, settings.chunking, self._counters.seen, self._lengths)
            (found.total / (rounds * batch.processes)).backward()  # type: ignore[no-untyped-call]
            bits += found.bits_per_byte / rounds
            chunks = [sofar + each / rounds for sofar, each in zip(chunks, found.positions_per_chunk, strict=True)]
        # Whoever began several processes is waiting for them; where it is gone, nobody is.
        orphaned = batch.processes > 1 and os.getppid() != self._parent
        self._sum[-1] = float(self._stopping or orphaned)
        if batch.processes > 1:
            distributed.all_reduce(self._sum)
        stopped = bool(self._sum[-1] > 0)
        gradients = {key: parameter.grad for key, parameter in self._parameters.items() if parameter.grad is not None}
        norms = clip(gradients, self._networks, settings.optimizer)
        rate = rate_at(settings.schedule, self._counters.seen)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.optimizer.learning_rate * group["multiplier"] * rate
        self._optimizer.step()
        seen = self._data.bytes_of(self._counters.step * batch.windows, batch.windows)
        self._counters = _replace(self._counters, step=self._counters.step + 1, seen=self._counters.seen + seen)
        figures = {"bits_per_byte": bits, "positions_per_chunk": chunks, "rate": rate, "gradient_norms": norms}
        return _Step(seen, stopped, figures)

    def _evaluate(self) -> Liveness:
        settings = self._job.settings
        heldout = Windows(self._heldout, settings.data.window, settings.seed)
        windows, targets = heldout.evenly(settings.reporting.evaluation_windows)
        return measure(self._model, windows, targets, settings.batch.micro, self._lengths)

    def _show(self) -> None:
        """The model as it is now, samples of it, and curves."""
        folder, reporting = self._job.folder, self._job.settings.reporting
        if self._job.settings.vocabulary is None:
            export(self._job.config, self._parameters, folder / "export")
            written = write_samples(folder / "export", reporting.prompts, reporting.sample_bytes)
            with (folder / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"── {self._counters.seen / 1e6:.2f} MB ──\n\n" + "\n\n".join(written) + "\n\n")
        try:
            draw(folder)
        except ModuleNotFoundError as error:
            self._say(f"no curves are drawn: {error}; they come with hnet-serve[train]")

    def _keep(self) -> None:
        parameters = {key: tensor.detach().clone() for key, tensor in self._parameters.items()}
        state = State(self._counters, parameters, checkpoint.moments_of(self._optimizer))
        checkpoint.save(self._job.folder / "states", state)


@dataclass(frozen=True)
class _Step:
    bytes: int
    stopped: bool
    figures: dict[str, Any]


def work(rank: int, job: Job, say: Callable[[str], None] | None = None) -> bool:
    """A process from beginning to end; see Worker.run."""
    torch.set_num_threads(1)
    torch.manual_seed(job.settings.seed)
    processes = job.settings.batch.processes
    if processes > 1:
        store = f"file://{job.rendezvous}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    try:
        worker = Worker(job, rank, say or partial(print, flush=True))
        with contextlib.suppress(ValueError):  # signals reach a main thread only
            signal.signal(signal.SIGINT, worker.stop)
            signal.signal(signal.SIGTERM, worker.stop)
        return worker.run()
    finally:
        if processes > 1:
            distributed.destroy_process_group()


def check_settings(job: Job, state: State) -> None:
    """Raises StateError, naming the first, where settings that decide the curve are others than the state's."""
    now, then = settings_of_curve(job.settings), state.counters.settings
    changed = sorted(key for key in now if then.get(key) != now[key])
    if changed and not job.accept_changes:
        name = changed[0]
        raise StateError(
            f"{job.folder}: {name} is {json.dumps(now[name])}, but the run so far had"
            f" {json.dumps(then.get(name))}; --accept-changes goes on all the same"
        )


def settings_of_curve(settings: TrainingSettings) -> dict[str, Any]:
    """What decides a run's curve, by dotted name. The schedule's end does not: a run may be given longer."""
    document = settings.model_dump(mode="json", exclude={"name", "reporting", "schedule"})
    document["schedule.warmup"] = settings.schedule.warmup
    document["data"] = {"window": settings.data.window, "train bytes": settings.data.train.stat().st_size}
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and key != "model":
            flat |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            flat[key] = value
    return flat


def _bind_gradients(parameters: dict[str, Tensor]) -> Tensor:
    """One tensor that all gradients lie in, side by side, so that they are emptied and summed as one; its last number
    is free for a flag."""
    total = torch.zeros(sum(tensor.numel() for tensor in parameters.values()) + 1)
    begin = 0
    for tensor in parameters.values():
        tensor.grad = total[begin : begin + tensor.numel()].view_as(tensor)
        begin += tensor.numel()
    return total


def _passed(seen: int, by: int, every: int) -> bool:
    return seen // every > (seen - by) // every


def _replace(counters: Counters, **changes: Any) -> Counters:
    return Counters(**(asdict(counters) | changes))
