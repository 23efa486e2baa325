"""An engine or a file on its way in, with a progress bar where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hnet_runtime import Engine

Progress = Callable[[int, int], None]
DEFAULT_MODEL_LEN = 8192
PREFILL_AT_ONCE = 1024  # bytes; nobody else waits


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


def load_engine(model: str | None, *, max_model_len: int = DEFAULT_MODEL_LEN, **options: Any) -> Engine:
    """An engine of one row, for one text at a time of up to `max_model_len` bytes; `options` are `engine_options`."""
    from server import engine_launch

    if max_model_len > DEFAULT_MODEL_LEN:
        click.echo(
            f"hnet: {max_model_len} bytes are more than the {DEFAULT_MODEL_LEN} that models are trained on", err=True
        )
    rows: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_model_len": max_model_len,
        "prefill_bytes_per_tick": PREFILL_AT_ONCE,
        "prefix_cache_memory": 0,  # no second text would find anything
    }
    with progress_bar(f"loading {model or 'the demo model'}") as progress:
        return engine_launch.load_engine(model=model, progress=progress, **rows, **options)
