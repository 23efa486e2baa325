"""Penalties, filters and early ends through the whole engine: a row is what it is alone, and says what it must."""

from __future__ import annotations

import codecs
from typing import Any

import numpy as np
import pytest

from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import NativeSampler
from hnet_runtime.engine.shaping import Penalties
from hnet_runtime.ops.native.library import open_library

PROMPT = b"\xfeThe quick brown fox "
SHAPES: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"repetition_penalty": 1.7},
    {"logit_bias": ((101, 30.0), (32, -100.0))},
    {"allowed_token_ids": tuple(range(97, 123))},
    {"bad_words": (b"e", b"th", b"the quick")},
    {"min_tokens": 12, "stop_token_ids": (32, 101), "stop": (b"a", b"b")},
    {"stop_token_ids": (0x80, 0xA9), "utf8": "raw", "repetition_penalty": 0.8, "logprobs": 2},
    {"presence_penalty": 2.0, "temperature": 0.0, "bad_words": ("é".encode(), "世".encode())},
]


def asked(index: int) -> dict[str, Any]:
    return {"max_tokens": 24, "seed": index, "temperature": 1.3, "logprobs": 1, **SHAPES[index % len(SHAPES)]}


def test_a_row_is_the_same_alone_and_in_a_crowd(driver_of):
    driver = driver_of("b_2stage", max_num_seqs=16)
    count = 2 * len(SHAPES)
    prompts = [PROMPT[: 4 + index % 9] for index in range(count)]
    alone = [driver_of("b_2stage").alone(prompts[index], **asked(index)).substance for index in range(count)]
    for index in range(count):
        driver.submit(str(index), prompts[index], **asked(index))
    crowd = driver.run()
    assert [crowd[str(index)].substance for index in range(count)] == alone


def test_logprobs_are_the_models_own_and_bytes_are_drawn_from_the_changed_ones(driver_of):
    """Step by step: the model's 256 log-probabilities, changed, and the largest taken."""
    params = {"temperature": 0.0, "repetition_penalty": 1.9, "frequency_penalty": 0.7, "logit_bias": ((97, 2.0),)}
    options = {"max_tokens": 30, "utf8": "raw", "ignore_eos": True, "logprobs": 256}
    shaped = driver_of("e_iso_T2").alone(PROMPT, **params, **options)
    plain = driver_of("e_iso_T2").alone(PROMPT, temperature=0.0, **options)
    assert shaped.data != plain.data
    assert shaped.logprobs[0].top == plain.logprobs[0].top
    penalties = Penalties.asked_for(SamplingParams(frequency_penalty=0.7, logit_bias=((97, 2.0),)), PROMPT)
    again = driver_of("e_iso_T2").alone(PROMPT, **{**params, "repetition_penalty": 1.0}, **options)
    assert penalties is not None
    for entry in again.logprobs:  # a shift of all logits changes nothing but where repetition is penalised
        logits = np.empty(256, dtype=np.float32)
        for byte, logprob in entry.top:
            logits[byte] = logprob
        assert int(penalties.apply(logits).argmax()) == entry.byte
        penalties.push(entry.byte)


def test_a_bias_of_100_forces_a_byte_and_of_minus_100_bans_it(driver_of):
    driver = driver_of("b_2stage")
    assert driver.alone(PROMPT, max_tokens=8, logit_bias=((120, 100.0),)).data == b"x" * 8
    banned = driver.alone(PROMPT, max_tokens=60, seed=3, temperature=2.0, logit_bias=((101, -100.0),), ignore_eos=True)
    assert ord("e") not in banned.data


def test_bytes_come_only_from_those_allowed_and_bad_words_never(driver_of):
    driver = driver_of("b_2stage")
    for seed in range(6):
        options = {"max_tokens": 60, "seed": seed, "temperature": 2.0}
        few = driver.alone(PROMPT, allowed_token_ids=(97, 98, 0xC3, 0xA9), bad_words=(b"aba", "bé".encode()), **options)
        text = few.data.decode("utf-8", "strict")
        assert set(text) <= set("abé")
        assert "aba" not in text
        assert "bé" not in text
        assert few.finish_reason == "length"


def test_it_does_not_end_before_min_tokens(driver_of):
    ends = tuple(range(0x20, 0x7F))
    for seed in range(6):
        options = {"max_tokens": 40, "seed": seed, "temperature": 1.5, "stop_token_ids": ends}
        gathered = driver_of("b_2stage").alone(PROMPT, min_tokens=20, include_stop_str_in_output=True, **options)
        assert len(gathered.data) >= 20
        if gathered.finish_reason == "stop" and gathered.stop_reason != 255:
            assert gathered.stop_reason == gathered.data[-1]
            assert gathered.stop_reason in ends
        gathered.data.decode("utf-8", "strict")


def test_stop_bytes_and_bad_words_inside_characters_keep_the_text_well_formed(driver_of):
    driver = driver_of("b_2stage")
    stopped = 0
    for seed in range(30):
        gathered = driver.alone(
            PROMPT,
            max_tokens=40,
            seed=seed,
            temperature=3.0,
            stop_token_ids=tuple(range(0x90, 0xA0)),
            bad_words=("é".encode(), "€".encode(), b"\xe4\xb8"),
            logit_bias=tuple((byte, 4.0) for byte in range(0x80, 0xF5)),
            ignore_eos=True,
        )
        stopped += gathered.finish_reason == "stop"
        # Only the last character may have been cut, and only by a stop byte.
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        decoder.decode(gathered.data)
        assert not decoder.getstate()[0] or gathered.finish_reason == "stop"
    assert stopped > 5


def test_a_row_that_is_left_no_byte_ends_with_an_error_that_says_so_and_no_other_suffers(driver_of):
    alone = driver_of("b_2stage").alone(PROMPT, max_tokens=12, seed=5).substance
    driver = driver_of("b_2stage")
    driver.submit("at once", PROMPT[:5], max_tokens=12, allowed_token_ids=(0x80,))
    driver.submit("fine", PROMPT, max_tokens=12, seed=5)
    driver.submit("later", PROMPT, max_tokens=12, allowed_token_ids=(97,), bad_words=(b"aaaa",))
    gathered = driver.run()
    assert gathered["fine"].substance == alone
    for name, data in (("at once", b""), ("later", b"aaa")):
        assert (gathered[name].data, gathered[name].finish_reason) == (data, "error")
        assert gathered[name].last.error is not None
        assert "allowed_token_ids" in gathered[name].last.error
        assert "bad_words" in gathered[name].last.error


def test_a_filter_of_all_bytes_is_none(driver_of):
    """A filter that lets everything through changes nothing."""
    first = driver_of("b_2stage").alone(PROMPT, max_tokens=5, seed=9, temperature=1.0, utf8="raw", ignore_eos=True)
    again = driver_of("b_2stage").alone(
        PROMPT,
        max_tokens=5,
        seed=9,
        temperature=1.0,
        utf8="raw",
        ignore_eos=True,
        allowed_token_ids=tuple(range(256)),
    )
    assert again.data == first.data


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_torch_and_native_samplers_agree_through_the_engine(driver_of, index):
    library = open_library()
    if library is None:
        pytest.skip("no native library is built here")
    expected = driver_of("b_2stage").alone(PROMPT, **asked(index)).substance
    driver = driver_of("b_2stage")
    driver.engine._loop._sampler = NativeSampler(library.calls)
    assert driver.alone(PROMPT, **asked(index)).substance == expected
