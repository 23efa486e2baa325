"""Continuous batching: whoever joins, leaves or is aborted, and when, all others get what they get alone."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnet_runtime.checkpoint import load_weights, locate

PROMPTS = [
    b"\xfe",
    b"\xfeA",
    b"\xfeOnce upon a time",
    b"\xfe" + "Grüße, 世界! 🦊 naïve café — Привет".encode(),
    b"\xfe" + b"The quick brown fox jumps over the lazy dog while 17 owls watch. ",
    b"\xfe" + b"T" * 75,
    b"\xfe" + "cut inside a 🦊".encode()[:-2],
    b"no BOS, and a \x80\xff few broken bytes \xc3",
]

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 28, "ignore_eos": True, "utf8": "raw", "logprobs": 3, "return_chunks": True},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 1.0, "max_tokens": 24, "seed": 7, "logprobs": 0, "return_chunks": True},
    {"temperature": 2.0, "max_tokens": 25, "seed": -3, "choice": 2, "top_k": 60, "ignore_eos": True},
    {"temperature": 0.8, "max_tokens": 20, "seed": 5, "top_p": 0.9, "min_p": 0.01, "utf8": "raw", "prompt_logprobs": 2},
    {
        "temperature": 1.5,
        "max_tokens": 40,
        "seed": 1,
        "stop": (b"e", b"ab", b" t"),
        "ignore_eos": True,
        "logprobs": 256,
    },
    {"temperature": 0.0, "max_tokens": 0, "prompt_logprobs": 0, "return_chunks": True},
]

MODELS = ["a_1stage", "b_2stage", "e_iso_T2"]


@cache
def demo():
    source = locate("demo")
    return source.config, load_weights(source, dtype=torch.float32)


@pytest.fixture
def driver_named(driver_of, driver_on):
    """Drivers on a golden model or, by the name `demo`, on the bundled one."""

    def build(name: str, **engine: Any):
        return driver_on(*demo(), **engine) if name == "demo" else driver_of(name, **engine)

    return build


_ALONE: dict[tuple[str, int, int], tuple[Any, ...]] = {}


def alone(driver_named, name: str, prompt: int, kind: int) -> tuple[Any, ...]:
    """What the request gets in an engine of its own, its prompt run whole."""
    if (name, prompt, kind) not in _ALONE:
        driver = driver_named(name, max_num_seqs=1, prefill_bytes_per_tick=1000)
        _ALONE[name, prompt, kind] = driver.alone(PROMPTS[prompt], **KINDS[kind]).substance
    return _ALONE[name, prompt, kind]


@pytest.mark.parametrize("budget", [1, 7, 64, 100_000])
@pytest.mark.parametrize("name", [*MODELS, "demo"])
def test_a_request_gets_the_same_alone_and_among_15_others(driver_named, name, budget):
    """Greedy and seeded rows that start and stop at other times, prompts whole and in spans."""
    driver = driver_named(name, prefill_bytes_per_tick=budget)
    rng = random.Random(budget)
    pairs = [(prompt, kind) for prompt in range(len(PROMPTS)) for kind in range(6)]
    rng.shuffle(pairs)
    wanted = {str(index): pair for index, pair in enumerate(pairs[:16])}
    for request_id, (prompt, kind) in wanted.items():
        driver.submit(request_id, PROMPTS[prompt], **KINDS[kind])
        for _ in range(rng.randrange(3)):
            driver.tick()
    driver.run()
    assert max(tick.stats.running for tick in driver.ticks) >= 8
    for request_id, (prompt, kind) in wanted.items():
        assert driver.gathered[request_id].substance == alone(driver_named, name, prompt, kind)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(0, len(KINDS) - 1)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("tick"), st.integers(1, 6), st.just(0)),
    ),
    min_size=2,
    max_size=24,
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, budget=st.sampled_from([1, 7, 64, 1000]), rows=st.sampled_from([1, 3, 16]))
def test_no_course_of_arrivals_and_aborts_changes_what_another_gets(driver_named, name, events, budget, rows):
    driver = driver_named(name, prefill_bytes_per_tick=budget, max_num_seqs=rows)
    wanted: dict[str, tuple[int, int]] = {}
    aborted: set[str] = set()
    for event, first, second in events:
        if event == "submit":
            request_id = str(len(wanted))
            wanted[request_id] = (first, second)
            driver.submit(request_id, PROMPTS[first], **KINDS[second])
        elif event == "abort":
            if str(first) in wanted and driver.gathered[str(first)].finish_reason is None:
                aborted.add(str(first))
            driver.engine.abort(str(first))  # of nobody, and of one who has finished, too
            driver.engine.check()
        else:
            for _ in range(first):
                driver.tick()
    driver.run()
    for request_id, pair in wanted.items():
        found, expected = driver.gathered[request_id], alone(driver_named, name, *pair)
        if request_id in aborted:
            assert found.finish_reason == "abort"
            # What came before is a beginning of it; a stop string's may be in it, which would have been cut out.
            held = max((len(stop) for stop in KINDS[pair[1]].get("stop", ())), default=1) - 1
            assert expected[0].startswith(found.data[: len(found.data) - held])
            assert found.chunks == expected[3][: len(found.chunks)]
        else:
            assert found.substance == expected


def test_an_abort_frees_the_row_for_the_next_one_at_once(driver_of):
    driver = driver_of("b_2stage", max_num_seqs=1)
    driver.submit("first", PROMPTS[4], **KINDS[0])
    driver.submit("second", PROMPTS[2], **KINDS[2])
    for _ in range(4):
        driver.tick()
    assert driver.gathered["second"].outputs == []
    driver.engine.abort("first")
    tick = driver.tick()
    assert driver.gathered["first"].finish_reason == "abort"
    assert tick.stats.running == 1
    assert driver.gathered["second"].data
    driver.run()


def test_an_abort_of_one_who_waits_answers_with_the_next_tick(driver_of):
    driver = driver_of("a_1stage", max_num_seqs=1)
    driver.submit("first", PROMPTS[4], **KINDS[0])
    driver.submit("second", PROMPTS[2], **KINDS[2])
    driver.engine.abort("second")
    assert driver.engine.has_work
    driver.tick()
    assert (driver.gathered["second"].finish_reason, driver.gathered["second"].data) == ("abort", b"")
    assert driver.gathered["second"].last.usage.chunks == (0,)
    driver.engine.abort("first")
    assert driver.engine.has_work
    driver.tick()
    assert not driver.engine.has_work
    assert driver.tick().outputs == ()


@pytest.mark.parametrize("name", ["b_2stage", "demo"])
def test_a_seed_alone_fixes_the_bytes(driver_named, name):
    """Whatever else is served, in whatever spans, on whatever row, and again in another engine."""
    params = {"temperature": 1.3, "max_tokens": 40, "ignore_eos": True}
    seeds = [0, 1, 2**40, -1]
    first = driver_named(name)
    texts = [first.alone(PROMPTS[2], seed=seed, **params).data for seed in seeds]
    assert len(set(texts)) == len(texts)
    second = driver_named(name, prefill_bytes_per_tick=3)
    for index, seed in enumerate(reversed(seeds)):
        second.submit(str(seed), PROMPTS[2], seed=seed, **params)
        second.submit(f"beside {index}", PROMPTS[index + 3], seed=99, **params)
        second.tick()
    second.run()
    assert [second.gathered[str(seed)].data for seed in seeds] == texts


def test_choices_of_one_seed_differ_and_repeat(driver_of):
    params = {"temperature": 1.3, "max_tokens": 30, "seed": 4, "ignore_eos": True}
    driver = driver_of("a_1stage")
    texts = [driver.alone(PROMPTS[2], choice=choice, **params).data for choice in (0, 1, 2, 0, 1)]
    assert texts[3:] == texts[:2]
    assert len(set(texts[:3])) == 3


def test_a_running_stream_gains_a_byte_every_tick_while_a_long_prompt_runs(driver_of):
    driver = driver_of("b_2stage", prefill_bytes_per_tick=5, prefill_share=1.0, batching="lockstep")
    driver.submit("stream", PROMPTS[1], **{**KINDS[0], "max_tokens": 60})
    driver.tick()
    driver.submit("long", PROMPTS[4], **KINDS[0])
    for _ in range(12):
        before = len(driver.gathered["stream"].data)
        tick = driver.tick()
        assert len(driver.gathered["stream"].data) == before + 1
        assert sum(r.rows for r in tick.stats.steps if r.kind == "prefill" and r.stage == 0) == 5
    assert driver.gathered["long"].data == b""
    driver.run()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [*MODELS, "demo"])
def test_a_hundred_requests_over_sixteen_rows(driver_named, name, seed):
    rng = random.Random(seed)
    driver = driver_named(name, prefill_bytes_per_tick=rng.choice([1, 5, 16, 64, 300]))
    wanted: dict[str, tuple[int, int]] = {}
    aborted = set()
    while len(wanted) < 100:
        if rng.random() < 0.5:
            request_id = str(len(wanted))
            wanted[request_id] = (rng.randrange(len(PROMPTS)), rng.randrange(len(KINDS)))
            prompt, kind = wanted[request_id]
            driver.submit(request_id, PROMPTS[prompt], **KINDS[kind])
        if wanted and rng.random() < 0.1:
            request_id = rng.choice(list(wanted))
            if driver.gathered[request_id].finish_reason is None:
                aborted.add(request_id)
            driver.engine.abort(request_id)
        driver.tick()
    driver.run()
    for request_id, pair in wanted.items():
        if request_id not in aborted:
            assert driver.gathered[request_id].substance == alone(driver_named, name, *pair)
