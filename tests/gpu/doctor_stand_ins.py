"""CPUs in a GPU's place for `hnet doctor --gpu`: twins for kernels, the emulator for graphs; one right, others not."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.entry import UNREAD
from hnet_runtime.ops.prefill import PrefillOps
from tests.gpu.emulator import EmulatedGraphs


class StandIn:
    """Right in everything."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        torch.set_num_threads(1)

    def missing(self) -> str:
        return ""

    def describe(self) -> dict[str, Any]:
        return {"device": "a CPU in its place", "packages": {"triton": "not needed"}, "prefill": {"scan": "torch"}}

    def step_ops(self) -> StepOps:
        return StepOps.torch()

    def prefill_ops(self, *, libraries: bool = False) -> PrefillOps:
        return PrefillOps.torch()

    def captures(self) -> EmulatedGraphs:
        return EmulatedGraphs()

    def synchronize(self) -> None:
        pass

    def copy_bandwidth(self) -> float:
        return 1e10


class Absent(StandIn):
    """Is not there."""

    def missing(self) -> str:
        return "no CUDA device: this is a test"


class WrongKernel(StandIn):
    """One kernel of a step is a little off, and one does not compile."""

    def step_ops(self) -> StepOps:
        twins = StepOps.torch()
        return replace(twins, swiglu=lambda y: twins.swiglu(y) * 1.02, descend_step=_not_compiled)

    def prefill_ops(self, *, libraries: bool = False) -> PrefillOps:
        twins = PrefillOps.torch()

        def forgetful(z: Tensor, p: Tensor, memory: Tensor, spans: Any) -> Tensor:
            return twins.smooth(z, p, memory.clone(), spans)

        return replace(twins, smooth=forgetful)


def _not_compiled(*arguments: Any) -> Any:
    raise RuntimeError("at 3:4:\n  unsupported\n  operand")


class Crashing(StandIn):
    """One kernel takes its process with it."""

    def step_ops(self) -> StepOps:
        return replace(StepOps.torch(), ema_step=_crash)


def _crash(*arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


class Spoiled(StandIn):
    """An illegal access: it is told late, and from then on the process's device is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self._is_spoiled = False

    def step_ops(self) -> StepOps:
        twins = StepOps.torch()

        def illegal(*arguments: Any) -> Any:
            self._is_spoiled = True
            return twins.gated_norm_step(*arguments)

        return replace(twins, gated_norm_step=illegal)

    def synchronize(self) -> None:
        if self._is_spoiled:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Hanging(StandIn):
    """One kernel never ends."""

    def step_ops(self) -> StepOps:
        return replace(StepOps.torch(), swiglu=lambda y: time.sleep(600))


class Flipping(StandIn):
    """The router of a step takes a few positions for what they are not."""

    def step_ops(self) -> StepOps:
        twins = StepOps.torch()

        def flips(h: Tensor, *arguments: Any) -> Tensor:
            p = twins.router_step(h, *arguments)
            return torch.where(h.float().sum(-1).abs() < 0.5, 1 - p, p)

        return replace(twins, router_step=flips)


class Stale(EmulatedGraphs):
    """Captures whose replays forget a part of what the step did."""

    def capture(self, run: Any, constants: Any, state: Any) -> Any:
        replay = super().capture(run, constants, state)
        tape = self.tapes[-1]
        del tape._entries[len(tape._entries) // 2]
        return replay


class StaleReplays(StandIn):
    """Its captured steps are not its eager ones."""

    def captures(self) -> EmulatedGraphs:
        return Stale()


class CrowdShy(StandIn):
    """What a row gets depends on who else is there."""

    def step_ops(self) -> StepOps:
        twins = StepOps.torch()

        def norm(h: Tensor, *arguments: Any) -> Tensor:
            return twins.add_rms_norm(h, *arguments) * (1.0 + 0.05 * (len(h) > 4))

        return replace(twins, add_rms_norm=norm)


class Unmasked(StandIn):
    """A step that is launched ahead runs for everybody it was launched for, and not for those who go on alone."""

    def step_ops(self) -> StepOps:
        return replace(StepOps.torch(), enter_step=_everybody)


def _everybody(
    rows: Tensor, data: Tensor, next_bytes: Tensor, embeddings: Tensor, ran: Tensor
) -> tuple[Tensor, Tensor]:
    byte = torch.where(data == UNREAD, next_bytes.index_select(0, rows), data)
    ran.copy_(rows > 0)
    return rows, embeddings.index_select(0, byte.clamp(min=0))
