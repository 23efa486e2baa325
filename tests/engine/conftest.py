"""Fixtures of the engine's tests: engines on small models, and a driver that listens to every tick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import ByteLogprobs, Chunk, Output, Request, SamplingParams, Tick
from hnet_runtime.model.hierarchy import HNet


@dataclass
class Gathered:
    """All that one request got, put together; what a listener may rely on is checked on the way."""

    data: bytes = b""
    logprobs: list[ByteLogprobs] = field(default_factory=list)
    prompt_logprobs: list[ByteLogprobs] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    @property
    def last(self) -> Output:
        return self.outputs[-1]

    @property
    def finish_reason(self) -> str | None:
        return self.last.finish_reason if self.outputs else None

    @property
    def stop_reason(self) -> bytes | int | None:
        return self.last.stop_reason

    @property
    def substance(self) -> tuple[Any, ...]:
        """Everything but times and how it was cut into Outputs."""
        usage = self.last.usage
        assert usage is not None
        counts = (usage.prompt_bytes, usage.completion_bytes, usage.chunks)
        said = (self.data, self.logprobs, self.prompt_logprobs, self.chunks)
        return (*said, self.finish_reason, self.stop_reason, self.last.error, counts)

    def add(self, output: Output) -> None:
        assert self.finish_reason is None, "an Output after the last"
        assert (output.usage is not None) == (output.finish_reason is not None)
        assert (output.error is not None) == (output.finish_reason == "error")
        something = (output.data, output.logprobs, output.prompt_logprobs, output.chunks, output.finish_reason)
        assert any(something), "an empty Output"
        if output.logprobs:
            assert [entry.byte for entry in output.logprobs] == list(output.data)
        if output.prompt_logprobs:
            assert not self.data, "prompt logprobs after data"
            assert not self.prompt_logprobs, "prompt logprobs twice"
        keys = [(chunk.start, chunk.stage) for chunk in (*self.chunks[-1:], *output.chunks)]
        assert keys == sorted(set(keys)), "chunks out of order"
        self.data += output.data
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.chunks += output.chunks
        self.outputs.append(output)
        if output.usage is not None:
            assert output.usage.completion_bytes == len(self.data)
            assert min(output.usage.queue_seconds, output.usage.prefill_seconds, output.usage.decode_seconds) >= 0


class Driver:
    """Turns an engine tick by tick, checks it after each, and gathers what every request got."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gathered: dict[str, Gathered] = {}
        self.ticks: list[Tick] = []

    def submit(self, request_id: str, prompt: bytes, salt: str = "", /, **params: Any) -> None:
        request = Request(request_id=request_id, prompt=prompt, params=SamplingParams(**params), cache_salt=salt)
        self.engine.submit(request)
        self.gathered[request_id] = Gathered()

    def tick(self) -> Tick:
        tick = self.engine.tick()
        self.engine.check()
        seen = [output.request_id for output in tick.outputs]
        assert len(seen) == len(set(seen)), "two Outputs of one request in a tick"
        for output in tick.outputs:
            self.gathered[output.request_id].add(output)
        self.ticks.append(tick)
        return tick

    def run(self, most: int = 3000) -> dict[str, Gathered]:
        """Ticks until nothing is left to do."""
        for _ in range(most):
            if not self.engine.has_work:
                break
            self.tick()
        assert not self.engine.has_work, f"still busy after {most} ticks"
        return self.gathered

    def alone(self, prompt: bytes, **params: Any) -> Gathered:
        """One request, run to its end."""
        request_id = f"alone-{len(self.gathered)}"
        self.submit(request_id, prompt, **params)
        return self.run()[request_id]


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """An engine sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def driver_of(keep_threads, golden_case, make_named_case) -> Callable[..., Driver]:
    """`driver_of(name, **EngineConfig)`: a driver of a new engine on a golden or generated model.

    Small by default: 16 rows, 512 bytes each, one thread.
    """

    def build(name: str, **settings: Any) -> Driver:
        case = golden_case(name) if name in GOLDEN else make_named_case(name)
        return Driver(engine_on(case.config, case.weights, **settings))

    return build


GOLDEN = ("a_1stage", "b_2stage", "e_iso_T2", "g_2stage_bf16")


def engine_on(config: Any, weights: Mapping[str, torch.Tensor], **settings: Any) -> Engine:
    defaults = {"max_num_seqs": 16, "max_model_len": 512, "threads": 1}
    return Engine(HNet(config, weights), config=EngineConfig(**{**defaults, **settings}))


@pytest.fixture
def driver_on(keep_threads) -> Callable[..., Driver]:
    """`driver_on(config, weights, **EngineConfig)`: the same on given weights."""
    return lambda config, weights, **settings: Driver(engine_on(config, weights, **settings))


@pytest.fixture
def driver_class() -> type[Driver]:
    return Driver
