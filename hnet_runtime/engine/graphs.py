"""Steps captured as graphs and replayed: which, in what order, in how much memory, and how often they ran.

Knows steps as functions without arguments; nothing of models or rows. What captures is behind an interface: CUDA graphs
on a GPU, or nothing at all.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from hnet_runtime.engine.messages import GraphReplays
from hnet_runtime.model.captured import StepKey

log = logging.getLogger("hnet.graphs")
MOST_GRAPHS = 128
_WARM_UPS = 2  # the first compiles kernels, the second finds them


class Captures(Protocol):
    """Turns a step into something that repeats it on the memory it ran on."""

    mode: Literal["graph", "eager"]

    def capture(
        self, run: Callable[[], None], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> Callable[[], None]:
        """`run` may be run for it, any number of times. What it returns does on the device what `run` does, and no
        Python of it. All memory that `run` touches and does not make is among `constants` and `state`."""

    @property
    def num_bytes(self) -> int:
        """Memory that what was captured holds."""


class Eager:
    """Captures nothing: a step is run whenever it is asked for."""

    mode: Literal["graph", "eager"] = "eager"
    num_bytes = 0

    def capture(
        self, run: Callable[[], None], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> Callable[[], None]:
        return run


class CudaGraphs:
    """CUDA graphs that share one pool of memory: no two run at a time, and what a step gives lies outside of it."""

    mode: Literal["graph", "eager"] = "graph"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def capture(
        self, run: Callable[[], None], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> Callable[[], None]:
        torch.cuda.synchronize(self._device)
        before = torch.cuda.mem_get_info(self._device)[0]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        torch.cuda.synchronize(self._device)
        self.num_bytes += max(before - torch.cuda.mem_get_info(self._device)[0], 0)
        return graph.replay


class StepGraphs:
    """Every step, captured, and its eager twin.

    most_graphs: buckets are left out where steps of all of them would be more; a step of a left out number of rows runs
    with more padding.
    """

    def __init__(self, captures: Captures, most_graphs: int = MOST_GRAPHS) -> None:
        self._captures, self._most_graphs = captures, most_graphs
        self._replays: dict[StepKey, Callable[[], None]] = {}
        self._eager: dict[StepKey, Callable[[], None]] = {}
        self._ran: Counter[tuple[Literal["byte", "stage"], int]] = Counter()  # by (kind, bucket), since the last `take`
        self.seconds = 0.0  # that capturing took

    @property
    def mode(self) -> Literal["graph", "eager"]:
        """`graph`, or `eager` where nothing is captured."""
        return self._captures.mode

    @property
    def num_graphs(self) -> int:
        return 0 if self.mode == "eager" else len(self._replays)

    @property
    def num_bytes(self) -> int:
        return self._captures.num_bytes

    def buckets(self, most: int, kinds: int) -> Sequence[int]:
        """Numbers of rows, rising, the last of them `most`."""
        return buckets(most, self._most_graphs // kinds)

    def prepare(
        self, steps: Mapping[StepKey, Callable[[], None]], constants: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """Captures all steps, those of most rows first: what they need of the pool, smaller ones find there."""
        began = time.perf_counter()
        with torch.no_grad():
            for key in sorted(steps, key=lambda each: -each.bucket):
                self._eager[key] = steps[key]
                self._replays[key] = self._captures.capture(steps[key], constants, state)
        self.seconds = time.perf_counter() - began
        if self.num_graphs:
            sizes = sorted({key.bucket for key in steps})
            log.info(
                "captured %d steps for %s rows in %.1f s and %.0f MiB",
                *(self.num_graphs, ", ".join(map(str, sizes)), self.seconds, self.num_bytes / 2**20),
            )

    def run(self, key: StepKey) -> None:
        self._replays[key]()
        self._ran["stage" if key.stage else "byte", key.bucket] += 1

    def take(self) -> tuple[GraphReplays, ...]:
        """What ran since the last call."""
        ran = tuple(GraphReplays(kind, bucket, self.mode, count) for (kind, bucket), count in self._ran.items())
        self._ran.clear()
        return ran

    def run_eagerly(self, key: StepKey) -> None:
        """The same step, operation by operation: what a replay is compared with."""
        self._eager[key]()


def buckets(most: int, budget: int) -> list[int]:
    """Numbers of rows from 1 to `most`: powers of two and what lies midway between them from 8 on, thinned from below
    where they are more than `budget`. Twice the rows cost less than twice the time, and so does the padding."""
    wanted = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    wanted += [size + size // 2 for size in wanted if size >= 8 and size + size // 2 < most]
    sizes = sorted({*wanted, most})
    while len(sizes) > max(budget, 1):
        # The one whose rows fare best with the next size up goes.
        worth = [sizes[index + 1] / sizes[index] for index in range(len(sizes) - 1)]
        del sizes[worth.index(min(worth))]
    return sizes
