"""A run from its settings to an exported model, in one process or several. Knows processes; nothing of what they
compute."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from training import checkpoint
from training.checkpoint import StateError
from training.settings import load
from training.tokens import texts_of_tokens
from training.worker import Job, check_settings, work

_ENDED, _STOPPED = 0, 3  # exit codes of a process


def train(settings_file: Path, folder: Path, *, accept_changes: bool = False, until: int | None = None) -> bool:
    """Trains what `settings_file` says in `folder`, going on from where a run there stopped.

    Returns whether the schedule came to its end; False after an interrupt, with a state to go on from. Raises
    SettingsError or StateError, of one line each.
    """
    settings, config = load(settings_file)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        job = Job(settings, config, folder, Path(meeting) / "rendezvous", accept_changes, until)
        if settings.batch.processes == 1:
            return work(0, job)
        _prepare(job)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(rank, job)) for rank in range(settings.batch.processes)]

        def stop(*_: Any) -> None:
            for process in processes:
                if process.is_alive():
                    process.terminate()  # which a worker takes for being told to stop

        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        codes = {process.exitcode for process in processes}
        if codes - {_ENDED, _STOPPED}:
            raise StateError(f"{folder}: a process of the run was lost; its last state can be gone on from")
        return codes == {_ENDED}


def _prepare(job: Job) -> None:
    """What is to be said in one line, or made, once: before several processes begin."""
    state = checkpoint.newest(job.folder / "states")
    if state is not None:
        check_settings(job, state)
    settings = job.settings
    if settings.vocabulary is not None:
        texts_of_tokens(settings.data.train, settings.data.heldout, settings.vocabulary, job.folder / "tokens")


def _work(rank: int, job: Job) -> None:
    sys.exit(_ENDED if work(rank, job) else _STOPPED)
