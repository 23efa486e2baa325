"""A run from its settings to an exported model, in one process or several. Knows processes; nothing of what they
compute."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch.multiprocessing as multiprocessing

from training.settings import load
from training.worker import Job, work


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
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=work, args=(rank, job)) for rank in range(settings.batch.processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return all(process.exitcode == 0 for process in processes)
