"""The engine as a whole: a checkpoint becomes something that takes requests and gives bytes.

Knows its parts and puts them together; no text, no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from hnet_runtime.checkpoint import locate
from hnet_runtime.config import StackConfig
from hnet_runtime.engine.building import (
    choose_device,
    choose_dtype,
    default_threads,
    launches_ahead,
    load_model,
    memory_for,
    open_state,
    snapshot_interval,
)
from hnet_runtime.engine.config import DType, EngineConfig, EngineError
from hnet_runtime.engine.graphs import StepGraphs
from hnet_runtime.engine.loop import EngineLoop, Limits
from hnet_runtime.engine.memory import RowMemory
from hnet_runtime.engine.messages import (
    ByteLogprobs,
    Chunk,
    EngineInfo,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    StageInfo,
    Tick,
    Usage,
)
from hnet_runtime.engine.policies import Limits as WaitLimits
from hnet_runtime.engine.policies import Policy, make_policy
from hnet_runtime.engine.runner import Runner
from hnet_runtime.engine.sampler import CapturedSampler, NativeSampler, Sampler
from hnet_runtime.engine.scheduler import PrefillRules, Scheduler
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.state.arenas import ModelState
from hnet_runtime.state.rows import RowPool


@dataclass(frozen=True)
class Completion:
    """A finished request of `Engine.generate`."""

    data: bytes
    finish_reason: FinishReason
    stop_reason: bytes | int | None
    chunks: tuple[Chunk, ...]
    logprobs: tuple[ByteLogprobs, ...]
    prompt_logprobs: tuple[ByteLogprobs, ...]
    usage: Usage
    error: str | None = None


class Engine:
    """Runs requests against one model. Not safe for several threads at once."""

    def __init__(
        self,
        model: HNet | NativeHNet,
        name: str = "model",
        config: EngineConfig | None = None,
        load_seconds: float = 0.0,
        policy: Policy | None = None,
    ) -> None:
        """policy: one of the caller's own, or one that has learned elsewhere, in place of that of `config.batching`."""
        config = config or EngineConfig()
        on_cpu = model.device.type == "cpu"
        if on_cpu:
            # With native kernels torch only samples, which one thread does faster.
            native = isinstance(model, NativeHNet)
            torch.set_num_threads(1 if native else config.threads or default_threads(model.config))
        plan = memory_for(model, config)
        num_rows = plan.num_rows
        state, graphs = open_state(model, plan, config)
        memory = RowMemory(RowPool(num_rows), state.pages, state, plan.prefix_cache_bytes)
        rules = PrefillRules(config.prefill_bytes_per_tick, config.prefill_share, snapshot_interval(state, config))
        num_stages = len(model.config.stages)
        scheduler = Scheduler(memory, policy or _policy(config, num_stages), num_stages, rules)
        limits = Limits(config.max_model_len)
        sampler = _sampler(model, state)
        runner = Runner(model, state, graphs)
        overlaps = launches_ahead(config, graphs, model.device)
        self._loop = EngineLoop(runner, sampler, scheduler, limits, num_rows, config.debug_checks, overlaps)
        self._scheduler = scheduler
        self._counter = 0
        self._mail: dict[str, list[Output]] = {}  # of `stream` and `generate`, until they take it
        self._kept: list[Output] = []  # of submitted requests, until the next tick
        self._unwanted: set[str] = set()  # embedded requests that were left; their last Output is dropped
        self.model = model
        self.config = replace(config, max_num_seqs=num_rows)
        self.info = _info(model, name, self.config, graphs, load_seconds)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        config: str | Path | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: DType = "auto",
        engine_config: EngineConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Engine:
        """An engine on a checkpoint: a directory, a file (with `config`), a hub id, `random:NAME`, or the demo model.

        `progress` is called with bytes loaded and bytes in all. Raises CheckpointError, ConfigError or
        EngineError, each naming what is wrong.
        """
        started = time.perf_counter()
        engine_config = engine_config or EngineConfig()
        source = locate(model, config=config, revision=revision)
        target = choose_device(device)
        network = load_model(source, choose_dtype(dtype, source, target), target, engine_config, progress)
        return cls(network, source.name, engine_config, time.perf_counter() - started)

    @property
    def has_work(self) -> bool:
        """True while a request waits, runs, or has an Output to give."""
        return self._loop.has_work or bool(self._kept)

    def submit(self, request: Request) -> None:
        """Queues a request; raises RequestError, with the parameter's name in `.param`."""
        self._loop.submit(request)

    def abort(self, request_id: str) -> None:
        """Ends a request; unknown ids are ignored, since a request may finish while its abort is on the way."""
        self._loop.abort(request_id)

    def tick(self) -> Tick:
        """One turn of the loop for all live requests; with nothing to do it returns at once.

        Gives what submitted requests gained since the last call, also in turns that `stream` or `generate` took.
        """
        tick = self._turn()
        kept, self._kept = self._kept, []
        return msgspec.structs.replace(tick, outputs=tuple(kept))

    def check(self) -> None:
        """Raises AssertionError unless every row and page is free, cached, or owned by live requests."""
        self._scheduler.check()

    def stream(self, prompt: bytes, params: SamplingParams | None = None) -> Iterator[Output]:
        """Runs one prompt (taken verbatim: begin it with BOS, byte 254) and yields what it gains.

        Other streams and submitted requests run along and lose nothing. A stream that is left frees its row.
        """
        request_id = self._begin(prompt, params or SamplingParams())
        try:
            finished = False
            while not finished:
                for output in self._mail[request_id]:
                    finished = output.finish_reason is not None
                    yield output
                self._mail[request_id] = []
                if not finished:
                    self._turn()
        finally:
            self._end(request_id)

    def generate(
        self, prompts: Sequence[bytes], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Runs prompts together (each taken verbatim) and returns their completions in order."""
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} SamplingParams")
        begun: list[str] = []
        try:
            for prompt, chosen in zip(prompts, each, strict=True):
                begun.append(self._begin(prompt, chosen))
            while not all(self._mail[one] and self._mail[one][-1].finish_reason for one in begun):
                self._turn()
            return [_completion(self._mail[one]) for one in begun]
        finally:
            for one in begun:
                self._end(one)

    def _begin(self, prompt: bytes, params: SamplingParams) -> str:
        """Submits a request whose Outputs are kept for `stream` or `generate`."""
        self._counter += 1
        request_id = f"embedded-{self._counter}"
        self.submit(Request(request_id=request_id, prompt=prompt, params=params))
        self._mail[request_id] = []
        return request_id

    def _end(self, request_id: str) -> None:
        """Nobody waits for the request any more: it is aborted if it still runs."""
        del self._mail[request_id]
        self._unwanted.add(request_id)
        self.abort(request_id)
        if request_id not in self._loop:
            self._unwanted.discard(request_id)

    def _turn(self) -> Tick:
        """One turn of the loop; Outputs go to who waits for them."""
        tick = self._loop.tick()
        for output in tick.outputs:
            if output.request_id in self._unwanted:
                self._unwanted.discard(output.request_id)
            else:
                self._mail.get(output.request_id, self._kept).append(output)
        return tick


def _completion(outputs: list[Output]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Completion(
        data=b"".join(output.data for output in outputs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        chunks=tuple(chunk for output in outputs for chunk in output.chunks),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
        usage=last.usage,
        error=last.error,
    )


def _sampler(model: HNet | NativeHNet, state: ModelState) -> Sampler:
    if isinstance(model, NativeHNet):
        return NativeSampler(model.library)
    if isinstance(model, CapturedHNet):
        return CapturedSampler(model.device, model.draws(state))
    return Sampler(model.device)


def _policy(config: EngineConfig, num_stages: int) -> Policy:
    try:
        return make_policy(config.batching, num_stages, WaitLimits(config.max_park_ticks, config.max_park_seconds))
    except ValueError as error:
        raise EngineError(str(error).replace("max_wait", "max_park")) from error


def _info(
    model: HNet | NativeHNet, name: str, config: EngineConfig, graphs: StepGraphs | None, load_seconds: float
) -> EngineInfo:
    assert config.max_num_seqs is not None
    stages = tuple(
        StageInfo(
            stage=stage.index,
            d_model=stage.d_model,
            layout=" · ".join(_layout(stack) for stack in stage.stacks),
            parameters=parameters,
        )
        for stage, parameters in zip(model.config.stages, model.config.parameters_per_stage, strict=True)
    )
    return EngineInfo(
        model=name,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        kernels=_kernels(model),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        stages=stages,
        embedding_parameters=model.config.embedding_parameters,
        load_seconds=load_seconds,
        num_graphs=graphs.num_graphs if graphs is not None else 0,
        capture_seconds=graphs.seconds if graphs is not None else 0.0,
        capture_bytes=graphs.num_bytes if graphs is not None else 0,
    )


def _kernels(model: HNet | NativeHNet) -> str:
    if isinstance(model, NativeHNet):
        return model.kernels
    return model.ops.name if isinstance(model, CapturedHNet) else "torch"


def _layout(stack: StackConfig) -> str:
    """Layers as the official layout writes them: runs of a letter and a count."""
    runs: list[tuple[str, int]] = []
    for layer in stack.layers:
        letter = "m" if layer.mixer == "mamba2" else "t"
        letter = letter.upper() if layer.has_mlp else letter
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return "".join(f"{letter}{count}" for letter, count in runs)
