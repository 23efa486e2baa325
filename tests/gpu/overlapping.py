"""Requests of all manners in courses of chance, on engines that launch steps ahead and on others."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Constraint
from tests.engine.conftest import Driver, Gathered

ROWS = 4
MANNERS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "utf8": "raw", "logprobs": 2},
    {"temperature": 1.2, "max_tokens": 40, "seed": 3, "return_chunks": True},
    {"temperature": 2.0, "max_tokens": 40, "seed": 4, "stop": (b"e", b"ab", b" t"), "ignore_eos": True},
    {"temperature": 2.0, "max_tokens": 40, "seed": 5, "stop": (b"a",), "include_stop_str_in_output": True},
    {"temperature": 1.0, "max_tokens": 40, "seed": 6, "utf8": "raw", "top_p": 0.95, "stop_token_ids": (101, 200)},
    {"temperature": 3.0, "max_tokens": 25, "seed": 7, "min_p": 0.001, "ignore_eos": True, "logprobs": 0},
    {"temperature": 2.5, "max_tokens": 50, "seed": 14, "utf8": "raw"},
    # Letters may end it, and mostly do not; and bytes that soon do.
    {"temperature": 2.0, "max_tokens": 30, "seed": 12, "stop": tuple(bytes((101, last)) for last in range(97, 123))},
    {"temperature": 2.0, "max_tokens": 40, "seed": 13, "stop_token_ids": tuple(range(60, 76)), "utf8": "raw"},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 1.0, "max_tokens": 2, "seed": 8, "prompt_logprobs": 1},
]
HOST_DRAWN: list[dict[str, Any]] = [
    {"temperature": 1.0, "max_tokens": 12, "seed": 9, "presence_penalty": 1.5, "repetition_penalty": 1.3},
    {"temperature": 2.0, "max_tokens": 12, "seed": 10, "min_tokens": 8, "bad_words": (b"e", b"th")},
    {"temperature": 1.0, "max_tokens": 12, "seed": 11, "constraint": Constraint(kind="regex", source="[a-c ]{3,9}!")},
]
"""What the numbers that a step knows when it is launched do not say how to draw."""


def play(model: Any, seed: int, *, overlap: bool | None = None, batching: Any = "lockstep", **settings: Any) -> Driver:
    """Requests of all manners come, go and are aborted in a course of chance, memory checked after each tick; in the
    end one is alone."""
    rng = random.Random(seed)
    config = EngineConfig(
        max_num_seqs=ROWS,
        max_model_len=128,
        threads=1,
        batching=batching,
        overlap=overlap,
        debug_checks=True,
        **settings,
    )
    driver = Driver(Engine(model, config=config))
    for number in range(14):
        manner = rng.choice(HOST_DRAWN if rng.random() < 0.12 else MANNERS)
        driver.submit(str(number), b"\xfeOnce upon a time there was a little girl"[: rng.randrange(1, 41)], **manner)
        for _ in range(rng.choice([0, 0, 1, 4, 12, 30])):
            driver.tick()
        if rng.random() < 0.25:
            driver.engine.abort(str(rng.randrange(number + 1)))
    driver.run()
    driver.alone(b"\xfeOnce", **MANNERS[0])
    return driver


def assert_same(found: Driver, truth: Mapping[str, Gathered]) -> None:
    """Each request got what it got there; of one that was aborted, when it was is a matter of time."""
    assert found.gathered.keys() == truth.keys()
    for name, each in found.gathered.items():
        if "abort" in (each.finish_reason, truth[name].finish_reason):
            together = min(len(each.data), len(truth[name].data))
            assert each.data[:together] == truth[name].data[:together], name
        else:
            assert each.substance == truth[name].substance, name


def num_overlapped(driver: Driver) -> int:
    return driver.ticks[-1].stats.overlapped_ticks_total
