"""Courses of events through an engine: who comes, goes and is aborted when, under which policy and with how little
memory, drawn at random; and that each request gets all the same what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from hnet_runtime.engine import structure
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.messages import Constraint
from hnet_runtime.engine.structure import DEAR_SECONDS
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.state.rows import PAGE

MAX_MODEL_LEN = 256
_FOX = b"\xfeThe quick brown fox jumps over the lazy dog while 17 owls watch. "
PROMPTS = [
    b"\xfe",
    b"\xfeOnce",
    _FOX,
    _FOX + b"Then it sleeps.",
    _FOX + b"The owls, in turn, watch the",
    _FOX[:40] + b"lept.",
    b"\xfe" + b"T" * 75,
    b"\xfe" + b"T" * 50 + b"!",
    b"\xfe" + "Grüße, 世界! 🦊 naïve café — Привет".encode(),
    b"no BOS, and a \x80\xff few broken bytes \xc3",
]
_OBJECT = Constraint(
    kind="json",
    source='{"type": "object", "properties": {"name": {"enum": ["Ann", "Anton", "é"]}, "years": {"type": "integer"}}, '
    '"required": ["name", "years"], "additionalProperties": false}',
    whitespace=" ?",
)
_SENTENCE = Constraint(kind="regex", source="The number is [0-9]{1,3}, and (that is all|there is more): .{0,9}!")
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, "utf8": "raw", "logprobs": 3, "return_chunks": True},
    {"temperature": 1.0, "max_tokens": 70, "seed": 7, "logprobs": 0, "return_chunks": True, "ignore_eos": True},
    {"temperature": 1.0, "max_tokens": 30, "seed": 7, "choice": 1, "return_chunks": True, "ignore_eos": True},
    {"temperature": 1.5, "max_tokens": 40, "seed": 1, "stop": (b"e", b"ab", b" t"), "ignore_eos": True},
    {"temperature": 0.8, "max_tokens": 20, "seed": 5, "top_p": 0.9, "utf8": "raw", "prompt_logprobs": 2},
    {"temperature": 0.0, "max_tokens": 0, "return_chunks": True},
    {"temperature": 0.0, "max_tokens": 1, "logprobs": 2},
    {"temperature": 1.0, "max_tokens": 60, "seed": 3, "constraint": _OBJECT, "utf8": "raw", "return_chunks": True},
    {"temperature": 1.0, "max_tokens": 60, "seed": 4, "constraint": _SENTENCE, "utf8": "raw", "return_chunks": True},
    {"temperature": 0.0, "max_tokens": 30, "constraint": _SENTENCE, "utf8": "raw", "logprobs": 1, "stop": (b"in",)},
    {"temperature": 1.0, "max_tokens": 25, "seed": 5, "constraint": _SENTENCE, "utf8": "raw", "return_chunks": True},
]
CHUNKY = RouterOverride((1.0, 1.0))
"""Every byte opens a chunk of every stage."""

_requests = st.tuples(
    st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(0, len(KINDS) - 1), st.sampled_from(["", "", "s"])
)
EVENTS = st.lists(
    st.one_of(
        _requests,
        _requests,
        st.tuples(st.just("turn"), st.integers(0, 20), st.integers(0, len(KINDS) - 1), st.just("")),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0), st.just("")),
        st.tuples(st.just("tick"), st.integers(1, 12), st.just(0), st.just("")),
        st.tuples(st.just("tick"), st.integers(1, 60), st.just(0), st.just("")),
    ),
    min_size=2,
    max_size=24,
)


def settings_for(kv_bytes_per_page: int) -> st.SearchStrategy[dict[str, Any]]:
    """EngineConfig's fields; pages for one longest request or a little more, where the model has pages."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "batching": st.sampled_from(["lockstep", "aligned", "adaptive"]),
        "max_num_seqs": st.integers(1, 6),
        "prefill_bytes_per_tick": st.sampled_from([1, 7, 64, 1000]),
        "prefill_share": st.sampled_from([0.2, 0.5, 1.0]),
        "max_park_ticks": st.sampled_from([2, 5, 64]),
        "prefix_cache_memory": st.sampled_from([0, 1 << 20, 1 << 28]),
        "prefix_cache_interval": st.sampled_from([None, 5, 32]),
        "masks_apart": st.booleans(),
    }
    if kv_bytes_per_page:
        drawn["kv_memory"] = st.integers(MAX_MODEL_LEN // PAGE, MAX_MODEL_LEN // PAGE + 2).map(
            lambda pages: pages * kv_bytes_per_page
        )
    return st.fixed_dictionaries(drawn)


TIGHT: list[Any] = [*(("submit", prompt, 1, "") for prompt in (6, 2, 8)), ("tick", 3, 0, "")]
"""Where every byte is a chunk, three requests that need three pages each: more than `tight_settings` has."""


def tight_settings(kv_bytes_per_page: int) -> dict[str, Any]:
    """Under which TIGHT preempts, whatever the time things take."""
    pages = MAX_MODEL_LEN // PAGE * kv_bytes_per_page
    return {"batching": "lockstep", "max_num_seqs": 4, "prefix_cache_memory": 0, "kv_memory": pages or None}


SHARING: list[Any] = [
    *(("submit", prompt, 0, "") for prompt in (3, 4, 8, 9)),
    ("tick", 60, 0, ""),
    *(("submit", prompt, 1, "") for prompt in (3, 4)),
    ("turn", 0, 0, ""),
]
ROOMY: dict[str, Any] = {"batching": "aligned", "max_num_seqs": 6, "prefix_cache_memory": 1 << 28}
"""Beginnings in common, one after the other and at once, and rows that park, whatever the time things take."""


class Truth:
    """What requests get in an engine of their own, in lock-step, with nothing cached and their prompts run whole."""

    def __init__(self, driver_of: Callable[[EngineConfig], Any]) -> None:
        self._driver_of = driver_of
        self._driver: Any = None
        self._known: dict[tuple[bytes, int], tuple[Any, ...]] = {}

    def of(self, prompt: bytes, kind: int) -> tuple[Any, ...]:
        if (prompt, kind) not in self._known:
            if self._driver is None:
                self._driver = self._driver_of(
                    EngineConfig(
                        max_num_seqs=1,
                        max_model_len=MAX_MODEL_LEN,
                        prefill_bytes_per_tick=1000,
                        batching="lockstep",
                        prefix_cache_memory=0,
                        threads=1,
                    )
                )
            self._known[prompt, kind] = self._driver.alone(prompt, **KINDS[kind]).substance
        return self._known[prompt, kind]


def run(driver_of: Callable[[EngineConfig], Any], truth: Truth, events: list[Any], settings: dict[str, Any]) -> Any:
    """Plays a course to its end, the engine's memory checked after each tick; every request must have got its truth.

    Returns the driver. `masks_apart`, of settings, has every mask of a grammar made in a thread.
    """
    settings = dict(settings)
    dear = -1.0 if settings.pop("masks_apart", False) else DEAR_SECONDS
    with mock.patch.object(structure, "DEAR_SECONDS", dear):
        return _run(driver_of, truth, events, settings)


def _run(driver_of: Callable[[EngineConfig], Any], truth: Truth, events: list[Any], settings: dict[str, Any]) -> Any:
    driver = driver_of(EngineConfig(max_model_len=MAX_MODEL_LEN, threads=1, debug_checks=True, **settings))
    wanted: dict[str, tuple[bytes, int]] = {}
    aborted: set[str] = set()

    def submit(prompt: bytes, kind: int, salt: str) -> None:
        request_id = str(len(wanted))
        wanted[request_id] = prompt, kind
        driver.submit(request_id, prompt, salt, **KINDS[kind])

    for event, first, second, salt in events:
        if event == "submit":
            submit(PROMPTS[first], second, salt)
        elif event == "turn":  # what was written so far, and a little more
            known = driver.gathered.get(str(first))
            if known is not None and known.finish_reason is not None:
                prompt = wanted[str(first)][0] + known.data + b" so"
                if len(prompt) + KINDS[second]["max_tokens"] <= MAX_MODEL_LEN:
                    submit(prompt, second, salt)
        elif event == "abort":
            if str(first) in wanted and driver.gathered[str(first)].finish_reason is None:
                aborted.add(str(first))
            driver.engine.abort(str(first))
            driver.engine.check()
        else:
            for _ in range(first):
                driver.tick()
    driver.run(most=20000)
    for request_id, (prompt, kind) in wanted.items():
        found, expected = driver.gathered[request_id], truth.of(prompt, kind)
        if request_id in aborted:
            assert found.finish_reason == "abort"
            # What came before is a beginning of it; a stop string's may be in it, which would have been cut out.
            held = max((len(stop) for stop in KINDS[kind].get("stop", ())), default=1) - 1
            assert expected[0].startswith(found.data[: len(found.data) - held])
            assert found.chunks == expected[3][: len(found.chunks)]
        else:
            assert found.substance == expected
    return driver
