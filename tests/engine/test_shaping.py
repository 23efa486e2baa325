"""Penalties and filters, each against a plain reading of what it means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.config import EOS
from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.shaping import ByteFilter, Penalties

LARGEST = np.finfo(np.float32).max


def noise(seed: int, scale: float = 5.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(256) * scale).astype(np.float32)


def penalties(prompt: bytes = b"\xfeab", completion: bytes = b"", **params) -> Penalties:
    made = Penalties.asked_for(SamplingParams(**params), prompt)
    assert made is not None
    for byte in completion:
        made.push(byte)
    return made


# ── logits ────────────────────────────────────────────────────────────────────────────────────


def test_who_asks_for_nothing_has_no_penalties_and_no_filter():
    params = SamplingParams(stop_token_ids=(10,), stop=(b"x",), include_stop_str_in_output=True, logit_bias=())
    assert Penalties.asked_for(params, b"\xfeab") is None
    assert ByteFilter.asked_for(params) is None


@pytest.mark.parametrize("seed", range(30))
def test_logits_are_changed_as_openai_and_vllm_define_it(seed):
    random = np.random.default_rng(seed)
    prompt, completion = (bytes(random.integers(0, 256, size, dtype=np.uint8)) for size in (40, 90))
    presence, frequency = random.uniform(-2, 2, 2)
    repetition = random.uniform(0.3, 3)
    bias = tuple((int(byte), float(random.uniform(-100, 100))) for byte in random.permutation(256)[:9])
    logits = noise(seed)
    found = penalties(
        prompt,
        completion,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
    ).apply(logits)
    for byte in range(256):
        expected = float(logits[byte]) + dict(bias).get(byte, 0.0)
        if byte in prompt + completion:
            expected = expected / repetition if expected > 0 else expected * repetition
        count = completion.count(byte)
        expected -= count * frequency + (count > 0) * presence
        assert found[byte] == np.float32(expected)


def test_presence_and_frequency_count_the_completion_alone_and_repetition_the_prompt_too():
    flat = np.ones(256, dtype=np.float32)
    assert (penalties(b"abc", presence_penalty=1.0, frequency_penalty=1.0).apply(flat) == 1).all()
    repeated = penalties(b"abc", repetition_penalty=2.0).apply(flat)
    assert np.flatnonzero(repeated != 1).tolist() == list(b"abc")
    counted = penalties(b"abc", b"xxx", frequency_penalty=0.5).apply(flat)
    assert (counted[ord("x")], counted[ord("a")]) == (-0.5, 1.0)


def test_a_penalty_leaves_the_models_own_logits_alone():
    logits = noise(1)
    before = logits.copy()
    penalties(completion=b"ab", presence_penalty=2.0, repetition_penalty=1.5, logit_bias=((3, 9.0),)).apply(logits)
    assert (logits == before).all()


@pytest.mark.parametrize("repetition", [5e-324, 1e-300, 1e300, 1.7e308])
def test_an_extreme_penalty_gives_finite_logits(repetition):
    logits = np.array([LARGEST, -LARGEST, 0.0, 1e-45] * 64, dtype=np.float32)
    found = penalties(bytes(range(256)), repetition_penalty=repetition, logit_bias=((0, 100.0),)).apply(logits)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_stay_so(poison):
    logits = noise(2)
    logits[7] = poison
    found = penalties(b"\x07", presence_penalty=1.0, repetition_penalty=2.0).apply(logits)
    assert not np.isfinite(found).all()


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────


def allowed(output: bytes = b"", *, remaining: int = 99, **params) -> set[int]:
    made = SamplingParams(**params)
    found = ByteFilter.asked_for(made)
    assert found is not None
    state = utf8.state_after(output) if made.utf8 == "strict" else utf8.START
    row = utf8.ANY_BYTE if made.utf8 == "raw" else utf8.mask_row(state, remaining, may_end=not made.ignore_eos)
    return set(np.flatnonzero(found.allowed(output, utf8.mask_table()[row], state)).tolist())


def test_only_allowed_bytes_may_come_and_eos_only_if_it_is_one():
    assert allowed(allowed_token_ids=(65, 66)) == {65, 66}
    assert allowed(allowed_token_ids=(65, EOS)) == {65, EOS}
    assert allowed(allowed_token_ids=(65, EOS), ignore_eos=True) == {65}
    assert allowed(allowed_token_ids=(65, EOS, 128), utf8="raw") == {65, EOS, 128}


def test_a_byte_that_would_complete_a_bad_word_may_not_come():
    every = set(range(256))
    words = (b"bad", b"ad", b"z")
    assert allowed(b"ba", bad_words=words, utf8="raw") == every - {ord("d"), ord("z")}
    assert allowed(b"b", bad_words=words, utf8="raw") == every - {ord("z")}
    assert allowed(b"xa", bad_words=words, utf8="raw") == every - {ord("d"), ord("z")}
    assert allowed(b"ba ", bad_words=words, utf8="raw") == every - {ord("z")}


def test_neither_eos_nor_a_stop_byte_comes_too_early():
    for output, early in ((b"", True), (b"ab", True), (b"abc", False), (b"abcd", False)):
        found = allowed(output, min_tokens=3, stop_token_ids=(10, 200), bad_words=(b"?",))
        assert {10, EOS} & found == (set() if early else {10, EOS})
        raw = allowed(output, min_tokens=3, stop_token_ids=(10, 200), bad_words=(b"?",), utf8="raw", ignore_eos=True)
        assert {10, 200, EOS} & raw == ({EOS} if early else {10, 200, EOS})


def test_a_filter_that_only_keeps_the_end_off_is_over_when_it_has():
    found = ByteFilter.asked_for(SamplingParams(min_tokens=3))
    assert found is not None
    assert [found.is_over(length) for length in (0, 2, 3, 4)] == [False, False, True, True]
    lasting = ByteFilter.asked_for(SamplingParams(min_tokens=3, bad_words=(b"x",)))
    assert lasting is not None
    assert not lasting.is_over(100)


def test_a_character_is_not_begun_that_other_rules_would_not_let_end():
    cafe = {*range(0x41, 0x5B), 0xC3, 0xE4}
    assert allowed(allowed_token_ids=tuple(cafe)) == set(range(0x41, 0x5B))
    assert allowed(allowed_token_ids=(*cafe, 0xA9)) == cafe
    assert allowed(b"\xe4", allowed_token_ids=(*cafe, 0xA9)) == {0xA9}
    # Of two ways into one character, the one that can end.
    words = tuple(b"\xe4\xb8" + bytes((last,)) for last in range(0x80, 0xC0))
    assert 0xB8 not in allowed(b"\xe4", bad_words=words)
    assert 0xB9 in allowed(b"\xe4", bad_words=words)
    assert 0xE4 in allowed(bad_words=words)
    assert allowed(bad_words=words, allowed_token_ids=(0x41, 0xE4, 0xB8)) == {0x41}


def test_a_stop_byte_is_an_end_to_a_character_too_but_not_before_its_time():
    only = {"allowed_token_ids": (0x41, 0xC3, 0xA9), "bad_words": (b"\xa9",)}
    assert allowed(**only) == {0x41}
    only["bad_words"] = ()
    stops = {**only, "stop_token_ids": (0xA9,)}
    assert allowed(**stops) == {0x41, 0xC3}
    assert allowed(b"A", min_tokens=2, **stops) == {0x41, 0xC3}  # the second byte ends the early ones
    assert allowed(b"", min_tokens=2, **stops) == {0x41}
    assert allowed(b"A\xc3", min_tokens=2, **stops) == {0xA9}


def test_rules_that_leave_no_byte_leave_none():
    assert allowed(allowed_token_ids=(0x80,)) == set()
    assert allowed(allowed_token_ids=(65,), bad_words=(b"A",), utf8="raw") == set()
    assert allowed(b"aa", allowed_token_ids=(97,), bad_words=(b"aaa",)) == set()
    assert allowed(allowed_token_ids=(EOS,), min_tokens=1, utf8="raw") == set()


BYTES = st.sampled_from([0x41, 0x42, 0x80, 0x90, 0xA9, 0xBF, 0xC3, 0xE0, 0xE4, 0xF0, 0xF4, 0xFF])
WORDS = st.lists(st.lists(BYTES, min_size=1, max_size=5).map(bytes), max_size=6).map(tuple)
FEW = st.none() | st.sets(BYTES, min_size=1).map(tuple)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    few=FEW,
    words=WORDS,
    stops=st.sets(BYTES, max_size=3).map(tuple),
    min_tokens=st.integers(0, 5),
    ignore_eos=st.booleans(),
    choices=st.lists(st.integers(0, 255), min_size=12, max_size=12),
)
def test_in_strict_mode_a_byte_may_come_if_and_only_if_something_well_formed_can_follow(
    few, words, stops, min_tokens, ignore_eos, choices
):
    """Against a search through all that could be written."""
    params = SamplingParams(
        allowed_token_ids=few, bad_words=words, stop_token_ids=stops, min_tokens=min_tokens, ignore_eos=ignore_eos
    )
    found = ByteFilter.asked_for(params)
    if found is None:
        return
    ends = (set() if ignore_eos else {EOS}) | set(stops)

    def may_come(output: bytes, state: int) -> set[int]:
        well_formed = utf8.mask_table()[utf8.mask_row(state, 4, may_end=EOS in ends)]
        return {
            byte
            for byte in range(256)
            if well_formed[byte]
            and (few is None or byte in few)
            and not any((output + bytes((byte,))).endswith(word) for word in words)
            and not (len(output) < min_tokens and byte in ends)
        }

    def can_end(output: bytes, state: int) -> bool:
        """Whether the character that `output` ends in comes to an end."""
        if state == utf8.START:
            return True
        return any(
            byte in ends or can_end(output + bytes((byte,)), utf8.advance(state, byte) or utf8.START)
            for byte in may_come(output, state)
        )

    output, state = b"", utf8.START
    for choice in choices:
        well_formed = utf8.mask_table()[utf8.mask_row(state, 4, may_end=EOS in ends)]
        exact = {
            byte
            for byte in may_come(output, state)
            if byte in ends or can_end(output + bytes((byte,)), utf8.advance(state, byte) or utf8.START)
        }
        assert set(np.flatnonzero(found.allowed(output, well_formed, state)).tolist()) == exact
        going_on = sorted(exact - ends)
        if not going_on:
            assert state == utf8.START or exact, "a character has no end"
            break
        byte = going_on[choice % len(going_on)]
        output, state = output + bytes((byte,)), utf8.advance(state, byte) or utf8.START
