"""An engine or a file on its way in, with a progress bar where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hnet_runtime import Engine

Progress = Callable[[int, int], None]
DEFAULT_MODEL_LEN = 8192


@contextmanager
def progress_bar(description: str) -> Iterator[Progress | None]:
    """A callback for (bytes done, bytes in all) that draws a bar on stderr, or None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield show


def load_engine(
    model: str | None,
    *,
    config: str | None,
    revision: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    max_model_len: int = DEFAULT_MODEL_LEN,
) -> Engine:
    """An engine of one row, for one text at a time of up to `max_model_len` bytes."""
    from hnet_runtime import Engine, EngineConfig

    if max_model_len > DEFAULT_MODEL_LEN:
        click.echo(
            f"hnet: {max_model_len} bytes are more than the {DEFAULT_MODEL_LEN} that models are trained on", err=True
        )
    settings = EngineConfig(max_num_seqs=1, max_model_len=max_model_len, prefill_bytes_per_tick=1024, threads=threads)
    with progress_bar(f"loading {model or 'the demo model'}") as progress:
        return Engine.from_pretrained(
            model,
            config=config,
            revision=revision,
            device=device,
            dtype=dtype,  # type: ignore[arg-type]  # a choice of the option, checked there
            engine_config=settings,
            progress=progress,
        )
