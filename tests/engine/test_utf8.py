"""UTF-8 as an automaton and as masks, against Python's own decoder."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.config import EOS
from hnet_runtime.engine import utf8

STATES = range(8)


def python_says(data: bytes) -> str:
    """`complete`, `begun` (it ends inside a character) or `broken`."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return "begun" if error.reason == "unexpected end of data" else "broken"
    return "complete"


def automaton_says(data: bytes) -> str:
    state: int | None = utf8.START
    for byte in data:
        state = utf8.advance(state, byte)
        if state is None:
            return "broken"
    return "complete" if state == utf8.START else "begun"


def allowed(state: int, remaining: int, may_end: bool = False) -> list[int]:
    return np.flatnonzero(utf8.mask_table()[utf8.mask_row(state, remaining, may_end)]).tolist()


# ── the automaton ─────────────────────────────────────────────────────────────────────────────


def test_every_sequence_of_one_or_two_bytes_is_judged_as_python_does():
    for first in range(256):
        assert automaton_says(bytes([first])) == python_says(bytes([first]))
        for second in range(256):
            data = bytes([first, second])
            assert automaton_says(data) == python_says(data), data


def test_every_third_byte_of_a_character_is_judged_as_python_does():
    begun = [bytes([a, b]) for a in range(0xC0, 0x100) for b in range(256) if python_says(bytes([a, b])) == "begun"]
    assert len(begun) > 1000
    for data in begun:
        for third in (*range(0x7E, 0x82), *range(0x8E, 0x92), *range(0x9E, 0xA2), *range(0xBE, 0xC3), 0, 0xED, 0xFF):
            assert automaton_says(data + bytes([third])) == python_says(data + bytes([third])), data


def test_sampled_sequences_of_four_bytes_are_judged_as_python_does():
    edges = bytes.fromhex("00 41 7f 80 8f 90 9f a0 bf c0 c2 df e0 e1 ed ef f0 f1 f3 f4 f5 ff")
    for a in bytes.fromhex("41 80 c2 e0 e1 ed ef f0 f1 f3 f4 f5"):
        for b in edges:
            for c in edges:
                for d in bytes.fromhex("00 7f 80 8f 90 bf c0 f4"):
                    data = bytes([a, b, c, d])
                    assert automaton_says(data) == python_says(data), data


def test_every_code_point_is_well_formed_and_no_surrogate_is():
    for point in (
        *range(0, 0x3000, 7),
        *range(0xD700, 0xE100),
        *range(0xFF00, 0x11000, 13),
        *range(0x10FF00, 0x110000),
    ):
        surrogate = 0xD800 <= point <= 0xDFFF
        data = chr(point).encode("utf-8", "surrogatepass")
        assert automaton_says(data) == ("broken" if surrogate else "complete"), hex(point)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=20), st.binary(max_size=6))
def test_text_with_any_tail_is_judged_as_python_does(text, tail):
    data = text.encode() + tail
    assert automaton_says(data) == python_says(data)


# ── where a prompt ends ───────────────────────────────────────────────────────────────────────


def inside(data: bytes) -> bytes:
    """The longest end of `data` that is a character begun and not finished."""
    for length in (3, 2, 1):
        tail = data[-length:]
        if len(tail) == length and tail[0] >= 0xC0 and python_says(tail) == "begun":
            return tail
    return b""


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.binary(max_size=4),
    st.lists(st.sampled_from(bytes.fromhex("41 80 9f a0 bf c3 e0 e4 ed f0 f4 fe ff")), max_size=4),
)
def test_the_state_after_any_bytes_is_that_of_the_character_they_end_in(head, tail):
    data = head + bytes(tail)
    state = utf8.START
    for byte in inside(data):
        state = utf8.advance(state, byte)
    assert utf8.state_after(data) == state


@pytest.mark.parametrize("text", ["é", "€", "世界", "🦊", "a🦊b", "\U0010ffff", "\ud7ff\ue000"])
def test_a_prompt_cut_inside_a_character_can_be_finished(text):
    data = b"\xfe" + text.encode()
    for cut in range(1, len(data) + 1):
        state = utf8.state_after(data[:cut])
        for byte in data[cut:]:
            assert byte in allowed(state, 4)
            state = utf8.advance(state, byte)
        assert state == utf8.START


# ── the masks ─────────────────────────────────────────────────────────────────────────────────


@cache
def well_formed(length: int) -> int:
    """How many well-formed texts of that many bytes there are: 128 characters of 1, 1920 of 2, 61440 of 3, 2²⁰ of 4."""
    if length <= 0:
        return int(length == 0)
    sizes = {1: 128, 2: 1920, 3: 0xF800 - 0x800, 4: 0x100000}
    return sum(count * well_formed(length - size) for size, count in sizes.items())


@cache
def reachable(state: int, remaining: int) -> int:
    """How many paths of exactly `remaining` bytes the masks allow, all of which must end between characters."""
    if remaining == 0:
        assert state == utf8.START, "the masks ran out of bytes inside a character"
        return 1
    total = 0
    for byte in allowed(state, remaining):
        following = utf8.advance(state, byte)
        assert following is not None
        total += reachable(following, remaining - 1)
    return total


@pytest.mark.parametrize("remaining", range(1, 9))
def test_masks_allow_exactly_the_well_formed_texts_of_the_bytes_that_remain(remaining):
    assert reachable(utf8.START, remaining) == well_formed(remaining)


@pytest.mark.parametrize("remaining", [1, 2, 3, 4, 5])
def test_every_allowed_path_decodes_strictly(remaining):
    """Over the first, the last and a middle byte of every run of allowed ones."""

    def walk(path: bytes, state: int) -> int:
        left = remaining - len(path)
        if not left:
            path.decode("utf-8", "strict")
            return 1
        choices = allowed(state, left)
        runs = np.split(choices, np.flatnonzero(np.diff(choices) > 1) + 1)
        count = 0
        for run in runs:
            for byte in {int(run[0]), int(run[len(run) // 2]), int(run[-1])}:
                following = utf8.advance(state, byte)
                assert following is not None
                count += walk(path + bytes([byte]), following)
        return count

    assert walk(b"", utf8.START) >= 3**remaining


def test_masks_know_no_more_than_four_bytes_ahead():
    for state in STATES:
        for remaining in (5, 100, 10**9):
            assert allowed(state, remaining) == allowed(state, 4)


def test_eos_may_come_only_between_characters_and_where_it_may_end():
    for state in STATES:
        for remaining in (1, 2, 3, 4):
            assert (EOS in allowed(state, remaining, may_end=True)) == (state == utf8.START)
            assert EOS not in allowed(state, remaining, may_end=False)
            without = [byte for byte in allowed(state, remaining, may_end=True) if byte != EOS]
            assert without == allowed(state, remaining, may_end=False)


def test_something_may_always_come():
    assert utf8.mask_table().any(axis=1).all()


def test_raw_allows_every_byte_and_no_other_row_does():
    table = utf8.mask_table()
    assert table[utf8.ANY_BYTE].all()
    assert not table[: utf8.ANY_BYTE].all(axis=1).any()
    assert len(table) == utf8.ANY_BYTE + 1
