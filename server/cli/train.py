"""`hnet train`: a model from a text, and, if asked, served. Knows the command's options; nothing of training."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from server.cli.options import option
from server.cli.streams import write


@click.command("train")
@click.argument("settings", metavar="CONFIG", type=click.Path(path_type=Path))
@option("--output", type=click.Path(path_type=Path), help="Folder of the run.", show_default="runs/NAME")
@option("--until", type=click.IntRange(1), help="Stop once so many bytes have been seen; the next call goes on.")
@option("--accept-changes", is_flag=True, help="Go on from a state that other settings led to.")
@option("--serve", is_flag=True, help="Serve the model when the run has ended, as `hnet serve` does.")
def train(settings: Path, *, output: Path | None, until: int | None, accept_changes: bool, serve: bool) -> int:
    """Train the model that the TOML file CONFIG describes, evaluating and exporting as it goes.

    A run that was interrupted goes on from its last state. RUN/export is a model for every other command;
    RUN/journal.jsonl, RUN/curves.png and RUN/samples.txt say how it went. docs/training.md has the settings.
    """
    try:
        from training.checkpoint import StateError
        from training.run import train as run
        from training.settings import SettingsError, load
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "training":
            raise
        raise click.ClickException(
            "this installation serves alone; training comes with a checkout or a wheel"
        ) from error

    try:
        name = load(settings)[0].name
        folder = output or Path("runs") / name
        ended = run(settings, folder, accept_changes=accept_changes, until=until)
    except (SettingsError, StateError) as error:
        raise click.ClickException(str(error)) from error
    write(f"{folder}/export: {'the model' if ended else 'the model of the last evaluation; the run can go on'}\n")
    if serve and ended:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "server.cli.main", "serve", str(folder / "export")])
    return 0 if ended else 1
