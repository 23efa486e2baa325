"""How much memory a server has for itself while load is on it. Knows time and a way to ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAMPLES = 120  # of one level, but none more often than once a second
Memory = tuple[float, int]  # seconds since the level's beginning, bytes


@contextmanager
def watched(ask: Callable[[], int] | None, seconds: float) -> Iterator[list[Memory]]:
    """Asks over and over while the block runs; the list it gives grows meanwhile. None asks nothing."""
    samples: list[Memory] = []
    if ask is None:
        yield samples
        return
    began, over = time.monotonic(), threading.Event()

    def sample() -> None:
        while not over.wait(max(1.0, seconds / SAMPLES)):
            samples.append((time.monotonic() - began, ask()))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()
