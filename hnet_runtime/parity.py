"""The path that would serve a model, against `model/reference.py` and against itself, over one text.

Knows a model's weights and nothing of requests. What is demanded, and why no more and no less:

- **the same bits** of a row read whole, byte by byte, and in spans among other rows. The native kernels owe it in every
  dtype, quantized ones too; the torch path in float32 on a CPU. Elsewhere the measure below applies.
- **FLOAT32**: the reference drifts by 1e-4 between its own ways of reading; no boundary flips.
- **FLOAT32_ACTIVATIONS**: native kernels take weights rounded to bfloat16 and keep activations in float32. Their
  reference is float32 arithmetic on those rounded weights. What is left are keys and values in bfloat16, and the
  router's 1 − cos, rounded to bfloat16 as the released model rounds it: p moves by up to 2⁻⁹, and one that near to one
  half is a tie. Twice that is allowed everywhere, so a boundary can flip at a tie and nowhere else.
- **BFLOAT16**: where one of the two rounds every activation as well. The same sums, arranged otherwise, round
  elsewhere.
- **INT8**: products round weights and activations to 8 bits. This says that nothing is broken, not how good a model
  still is: for that the bits per byte of the checked text are given, and they depend on the text.

How many boundaries flip hangs on the model more than on the arithmetic: random weights put every p so near to one half
that one in twenty is a tie, trained ones hardly any. Hence the wide limits on flips; they only keep two readings that
have nothing to do with each other from passing. What a flip may be, p decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import torch
from torch import Tensor

from hnet_runtime.comparison import Check, Reading, Tolerance, Trace, check
from hnet_runtime.config import ModelConfig
from hnet_runtime.engine.building import build_model
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.model.reference import Reference
from hnet_runtime.model.results import Verdicts
from hnet_runtime.ops.native.library import NativeLibrary
from hnet_runtime.state.rows import PAGE, pages_for

EXACT = Tolerance(bitwise=True)
FLOAT32 = Tolerance(max_abs=1e-3, p_max_abs=1e-4, flips=0.0)
FLOAT32_ACTIVATIONS = Tolerance(rms=0.05, same_argmax=0.9, p_max_abs=2**-8, flips=0.15)
BFLOAT16 = Tolerance(rms=0.5, same_argmax=0.75, p_rms=0.05, flips=0.15)
INT8 = Tolerance(rms=1.0, same_argmax=0.5, p_rms=0.1, bits_per_byte=0.5, flips=0.15)

_CROWD, _WATCHED = 8, 3  # rows that run beside each other, and the place of the one that is looked at


@dataclass(frozen=True)
class StepTime:
    """Steps of one row alone that ran every stage down to `stage` and no further.

    count: how many there were; seconds: median of the whole step; own_seconds: of what stage `stage` itself took.
    """

    stage: int
    count: int
    seconds: float
    own_seconds: float


@dataclass(frozen=True)
class Findings:
    """kernels: the code that serves, as in EngineInfo; served_bytes: the weights as it holds them."""

    checks: tuple[Check, ...]
    steps: tuple[StepTime, ...]
    kernels: str
    served_bytes: int


def check_runtime(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    data: bytes,
    engine_config: EngineConfig | None = None,
    library: NativeLibrary | None = None,
) -> Findings:
    """Checks the native kernels of `library`, or without one the code that serves on the weights' device (on a GPU its
    steps are not captured), over `data` (BOS first); times steps."""
    engine_config = engine_config or EngineConfig()
    embeddings = weights["embeddings.weight"]
    fine = embeddings.dtype is torch.float32
    checks: list[Check] = []
    network: HNet | NativeHNet
    if library is None:
        network = build_model(config, dict(weights), replace(engine_config, enforce_eager=True), None)
        kernels = network.ops.name if isinstance(network, CapturedHNet) else "torch"
        path = "torch path" if kernels == "torch" else f"{kernels} path"
        reference = read_by_reference(config, weights)
        checks.append(check(f"{path} against the reference", reference, read_by(network), data, _loose(fine)))
        exact = fine and embeddings.device.type == "cpu"
    else:
        # The weights are taken from the mapping as they are packed: each model gets a mapping of its own.
        network = build_model(config, dict(weights), replace(engine_config, quantization=None), library)
        reference = read_by_reference(config, weights, torch.float32)
        tolerance = FLOAT32 if fine else FLOAT32_ACTIVATIONS
        checks.append(check("native kernels against the reference", reference, read_by(network), data, tolerance))
        twin = read_by(HNet(config, weights))
        checks.append(check("native kernels against the torch path", twin, read_by(network), data, _loose(fine)))
        if engine_config.quantization is not None:
            name = f"{engine_config.quantization} against the reference"
            del network  # before the other one takes memory
            network = build_model(config, dict(weights), engine_config, library)
            checks.append(check(name, reference, read_by(network), data, INT8))
        exact = True
    times: list[tuple[int, float, float]] = []
    tolerance = EXACT if exact else _loose(fine)
    alone, stepped, crowd = read_by(network), read_by(network, bytewise, times), read_by(network, crowded)
    checks.append(check("read whole against byte by byte", alone, stepped, data, tolerance))
    checks.append(check("alone against in a crowd", alone, crowd, data, tolerance))
    served_bytes = sum(tensor.nbytes for tensor in weights.values())
    if isinstance(network, NativeHNet):
        kernels, served_bytes = network.kernels, network.weight_bytes
    return Findings(tuple(checks), _medians(times), kernels, served_bytes)


def _loose(fine: bool) -> Tolerance:
    return FLOAT32 if fine else BFLOAT16


class _Cast(dict[str, Tensor]):
    """Weights in a wider dtype, each cast when it is read: a large model's are not held a second time."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(weights)
        self._dtype = dtype

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key).to(self._dtype)


def read_by_reference(config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Reading:
    """The oracle's reading, in arithmetic of `dtype` (the weights' own where None)."""
    reference = Reference(config, weights)
    if dtype is not None:
        reference.weights = _Cast(weights, dtype)
    device = weights["embeddings.weight"].device

    def read(data: bytes) -> Trace:
        output = reference.forward(torch.tensor(list(data), device=device))
        offsets: list[int] = list(range(len(data)))
        p, boundaries = [], []
        for said, opens in zip(output.probabilities, output.boundaries, strict=True):
            p.append(dict(zip(offsets, said.float().tolist(), strict=True)))
            offsets = [offset for offset, opened in zip(offsets, opens.tolist(), strict=True) if opened]
            boundaries.append(frozenset(offsets))
        return Trace(output.logits.float().cpu(), tuple(p), tuple(boundaries))

    return cache(read)


# A text → rows, each the pieces it is fed, and which one of them has the text.
Cut = Callable[[bytes], tuple[list[list[bytes]], int]]


def whole(data: bytes) -> tuple[list[list[bytes]], int]:
    """The text alone, in one piece."""
    return [[data]], 0


def bytewise(data: bytes) -> tuple[list[list[bytes]], int]:
    """The text alone, byte by byte."""
    return [_pieces(data, 1)], 0


def crowded(data: bytes) -> tuple[list[list[bytes]], int]:
    """The text in spans of 7, among rows of other texts and lengths that start and stop at other places."""
    rows = []
    for neighbour in range(1, _CROWD):
        other = data[:1] + data[1 + neighbour * 5 :][: len(data) // 2 + neighbour]
        rows.append(_pieces(other, neighbour))
    rows.insert(_WATCHED, _pieces(data, 7))
    return rows, _WATCHED


def _pieces(data: bytes, length: int) -> list[bytes]:
    return [data[at : at + length] for at in range(0, len(data), length)]


def read_by(
    network: HNet | NativeHNet, cut: Cut = whole, times: list[tuple[int, float, float]] | None = None
) -> Reading:
    """A runtime's reading of a text that is fed as `cut` says.

    `times` gains, of every turn in which one row alone took one byte: the deepest stage that ran, the turn's seconds,
    and the seconds of that stage itself.
    """

    def read(data: bytes) -> Trace:
        rows, watched = cut(data)
        longest = max(sum(map(len, pieces)) for pieces in rows)
        state = network.new_state(
            num_rows=len(rows), kv_positions=len(rows) * pages_for(longest) * PAGE, max_positions=longest
        )
        numbers = list(range(1, len(rows) + 1))
        for pool in state.page_pools:
            for number in numbers:
                pool.reserve(number, longest)
        state.reset(numbers)
        logits: list[Tensor] = []
        p: list[dict[int, float]] = [{} for _ in range(network.config.num_routed_stages)]
        boundaries: list[set[int]] = [set() for _ in p]
        for turn in range(max(map(len, rows))):
            live = {number: pieces[turn] for number, pieces in zip(numbers, rows, strict=True) if turn < len(pieces)}
            lengths = [len(piece) for piece in live.values()]
            started = time.perf_counter()
            result = network.run(state, list(live), list(live.values()), lengths)
            found = torch.split(result.logits.cpu(), lengths)
            if times is not None and lengths == [1]:
                deepest = result.work[-1]
                times.append((deepest.stage, time.perf_counter() - started, deepest.seconds))
            logits += [each for number, each in zip(live, found, strict=True) if number == numbers[watched]]
            for stage, said in enumerate(result.verdicts):
                _note(said, numbers[watched], p[stage], boundaries[stage])
        return Trace(torch.cat(logits), tuple(p), tuple(frozenset(each) for each in boundaries))

    return cache(read)


def _note(said: Verdicts, row: int, p: dict[int, float], boundaries: set[int]) -> None:
    """Keeps what a router said of one row."""
    ours = said.rows == row
    offsets = said.offsets[ours].tolist()
    p.update(zip(offsets, said.p[ours].tolist(), strict=True))
    boundaries.update(offset for offset, opens in zip(offsets, said.boundary[ours].tolist(), strict=True) if opens)


def _medians(times: Sequence[tuple[int, float, float]]) -> tuple[StepTime, ...]:
    steps = []
    for stage in sorted({stage for stage, _, _ in times}):
        seconds, own = zip(*((whole, own) for deepest, whole, own in times if deepest == stage), strict=True)
        steps.append(StepTime(stage, len(seconds), median(seconds), median(own)))
    return tuple(steps)
