"""A step that the device was given and nobody has read. Knows who is in it and by what they draw; not what is done
about what they drew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from hnet_runtime.engine.request import LiveRequest
from hnet_runtime.engine.runner import Landing, Runner, Stepped
from hnet_runtime.engine.sampler import RowSampling, Sampler


@dataclass(eq=False)
class Flight:
    """requests: who the step was launched for; unread: who of them were to go on with a byte that nobody had read.

    riders: who runs in it, all of them unless it was launched behind another one: then `board` says.
    expected: by what its rows draw; began: when it was launched.
    """

    requests: Sequence[LiveRequest]
    unread: Sequence[bool]
    stage: int
    began: float
    expected: dict[LiveRequest, RowSampling]
    riders: set[LiveRequest]
    _landing: Landing

    def board(self) -> None:
        """Whoever is over by what the step before drew, or may be, does not ride. The device has found so by itself."""
        self.riders = {
            request
            for request, unread in zip(self.requests, self.unread, strict=True)
            if request.finish_reason is None and not (unread and request.endings[request.output[-1]])
        }

    def land(self) -> tuple[list[LiveRequest], Stepped]:
        """Waits for it: who rode in it, in order, and what came of their positions."""
        ran, result = self._landing()
        rode = [request for request, did in zip(self.requests, ran, strict=True) if did]
        assert self.riders == set(rode), "the device and the host disagree about who went on"
        return rode, result


def launch(
    runner: Runner,
    sampler: Sampler,
    requests: Sequence[LiveRequest],
    data: bytes,
    stage: int = 0,
    *,
    through: bool,
    unread: Sequence[bool] | None = None,
) -> Flight:
    """One position of each request's row at `stage`, as `Runner.launch`. The sampler is told by what they draw, but for
    those whose mask or logits are not the step's to know."""
    began = time.perf_counter()
    follows = unread or [False] * len(requests)
    expected: dict[LiveRequest, RowSampling] = {}
    if sampler.draws_ahead:
        expected = {
            request: row_sampling(request, each)
            for request, each in zip(requests, follows, strict=True)
            if request.structure is None and request.penalties is None
        }
        sampler.expect([expected.get(request) for request in requests])
    rows = [request.row or 0 for request in requests]
    landing = runner.launch(rows, data, stage=stage, through=through, unread=unread)
    return Flight(requests, follows, stage, began, expected, set(requests), landing)


def row_sampling(request: LiveRequest, follows: bool = False) -> RowSampling:
    """By what its next byte is drawn, or the one that `follows` that."""
    uniform = request.random[len(request.output) + follows] if request.params.temperature else 0.0
    mask_row = request.mask_row_ahead(follows)
    return RowSampling(request.params, mask_row, uniform, request.allowed, request.endings, follows)
