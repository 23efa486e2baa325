"""The engine on native kernels: the recorded bytes, and the same for a request alone and in a crowd, in every dtype."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.ops.native import binding
from hnet_runtime.ops.native.binding import NativeError

NUMBERS = ["float32", "bfloat16", "int8"]
GREEDY = {"temperature": 0.0, "ignore_eos": True, "utf8": "raw"}
PROMPTS = [
    b"\xfe",
    b"\xfeOnce upon a time",
    b"\xfe" + "Grüße, 世界! 🦊 naïve café — Привет".encode(),
    b"\xfe" + b"T" * 75,
    b"no BOS, and a \x80\xff few broken bytes \xc3",
]
KINDS: list[dict[str, Any]] = [
    {"max_tokens": 20, "logprobs": 3, "return_chunks": True, **GREEDY},
    {"temperature": 1.0, "max_tokens": 18, "seed": 7, "logprobs": 0, "return_chunks": True},
    {"temperature": 0.8, "max_tokens": 16, "seed": 5, "top_p": 0.9, "min_p": 0.01, "utf8": "raw", "prompt_logprobs": 2},
    {"temperature": 1.5, "max_tokens": 24, "seed": 1, "stop": (b"e", b" t"), "top_k": 60, "logprobs": 256},
]


@pytest.fixture
def driver_on(driver_class, keep_threads) -> Callable[..., Any]:
    """`driver_on(model, **EngineConfig)`: a driver of a new engine, 16 rows of 256 bytes by default."""

    def build(model: NativeHNet, **settings: Any) -> Any:
        return driver_class(
            Engine(model, config=EngineConfig(**{"max_num_seqs": 16, "max_model_len": 512, **settings}))
        )

    return build


@pytest.mark.parametrize("budget", [7, 100_000])
def test_all_prompts_together_give_the_recorded_bytes_and_boundaries(fp32_golden, native_of, driver_on, budget):
    driver = driver_on(native_of(fp32_golden.config, fp32_golden.weights), prefill_bytes_per_tick=budget)
    prompts = {str(prompt.index): prompt for prompt in fp32_golden.prompts()}
    for request_id, prompt in prompts.items():
        driver.submit(request_id, bytes(prompt.ids.tolist()), max_tokens=65, logprobs=0, return_chunks=True, **GREEDY)
    for request_id, gathered in driver.run().items():
        prompt = prompts[request_id]
        assert gathered.data == bytes(prompt.decode_tokens.tolist())
        exact = torch.log_softmax(prompt.fed_logits[len(prompt.ids) - 1 :].double(), -1)
        for entry, truth in zip(gathered.logprobs, exact, strict=True):
            assert abs(entry.logprob - float(truth[entry.byte])) <= 2 * fp32_golden.logits_atol
        offsets = torch.arange(len(prompt.fed_ids))
        for stage, boundary in enumerate(prompt.fed_boundaries, start=1):
            offsets = offsets[boundary]
            assert [chunk.start for chunk in gathered.chunks if chunk.stage == stage] == offsets.tolist()


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["b_2stage", pytest.param("demo", marks=pytest.mark.slow)])
def test_a_request_gets_the_same_alone_and_among_15_others(case_named, native_of, driver_on, name, numbers):
    """Bytes, chunks and log-probabilities, exactly, for greedy and for seeded requests that come and go."""
    model = native_of(*case_named(name), numbers)
    rng = random.Random(3)
    pairs = [(prompt, kind) for prompt in range(len(PROMPTS)) for kind in range(len(KINDS))]
    rng.shuffle(pairs)
    crowd = driver_on(model, prefill_bytes_per_tick=23)
    for index, (prompt, kind) in enumerate(pairs[:16]):
        crowd.submit(str(index), PROMPTS[prompt], **KINDS[kind])
        for _ in range(rng.randrange(3)):
            crowd.tick()
    crowd.run()
    assert max(tick.stats.running for tick in crowd.ticks) >= 8
    lone = driver_on(model, max_num_seqs=1, prefill_bytes_per_tick=1000)
    for index, (prompt, kind) in enumerate(pairs[:16]):
        assert crowd.gathered[str(index)].substance == lone.alone(PROMPTS[prompt], **KINDS[kind]).substance


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_row_that_was_aborted_serves_the_next_request_as_if_new(case_named, native_of, driver_on, numbers):
    model = native_of(*case_named("b_2stage"), numbers)
    expected = driver_on(model, max_num_seqs=1).alone(PROMPTS[2], **KINDS[0]).substance
    for ticks in (1, 2, 9):  # in the middle of its prompt, and of its completion
        driver = driver_on(model, max_num_seqs=1, prefill_bytes_per_tick=7)
        driver.submit("left", PROMPTS[3], max_tokens=200, **GREEDY)
        for _ in range(ticks):
            driver.tick()
        assert driver.gathered["left"].finish_reason is None
        driver.engine.abort("left")
        assert driver.alone(PROMPTS[2], **KINDS[0]).substance == expected
        assert driver.gathered["left"].finish_reason == "abort"


def test_a_request_whose_numbers_are_not_finite_ends_alone(case_named, native_of, driver_on):
    config, weights = case_named("b_2stage")
    spoilt = {key: tensor.clone() for key, tensor in weights.items()}
    spoilt["embeddings.weight"][ord("Q")] = float("nan")
    driver = driver_on(native_of(config, spoilt))
    driver.submit("sick", b"\xfeQ", **KINDS[0])
    driver.submit("well", PROMPTS[0], **{**KINDS[0], "max_tokens": 3})
    driver.run()
    assert driver.gathered["sick"].finish_reason == "error"
    assert driver.gathered["well"].finish_reason == "length"


def test_the_engine_says_what_runs_it(case_named, library, keep_threads):
    config, weights = case_named("a_1stage")
    model = NativeHNet(config, dict(weights), library.calls, 1, quantized=True, isa=library.isa)
    assert Engine(model, config=EngineConfig(max_num_seqs=2, max_model_len=64)).info.kernels == (
        f"native {library.isa} int8"
    )


def test_a_library_of_another_interface_is_refused_in_one_line(library, monkeypatch):
    monkeypatch.setattr(binding, "INTERFACE", binding.INTERFACE + 1)
    with pytest.raises(
        NativeError, match=rf"built for interface {binding.INTERFACE - 1}, not {binding.INTERFACE}"
    ) as caught:
        binding.load(library.path)
    assert str(library.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named_in_one_line(tmp_path: Path):
    path = tmp_path / "libhnet_none.so"
    with pytest.raises(NativeError, match=r"libhnet_none\.so: not a native library") as caught:
        binding.load(path)
    assert "\n" not in str(caught.value)
