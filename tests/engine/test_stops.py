"""Stop strings, against `bytes.endswith`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.engine.stops import StopMatcher

SETTINGS = settings(max_examples=400, deadline=None, derandomize=True)
LETTERS = st.sampled_from(b"ab")
STOPS = st.lists(st.lists(LETTERS, min_size=1, max_size=6).map(bytes), min_size=0, max_size=4)
DATA = st.lists(LETTERS, max_size=40).map(bytes)


@SETTINGS
@given(STOPS, DATA)
def test_a_push_finds_the_longest_stop_string_that_ends_there(stops, data):
    matcher = StopMatcher(stops)
    for end in range(1, len(data) + 1):
        expected = max((stop for stop in stops if data[:end].endswith(stop)), key=len, default=None)
        assert matcher.push(data[end - 1]) == expected


@SETTINGS
@given(STOPS, DATA)
def test_pending_is_exactly_what_may_begin_a_stop_string(stops, data):
    matcher = StopMatcher(stops)
    assert matcher.pending == 0
    for end in range(1, len(data) + 1):
        matcher.push(data[end - 1])
        beginnings = {stop[:length] for stop in stops for length in range(len(stop) + 1)}
        assert matcher.pending == max((len(b) for b in beginnings if data[:end].endswith(b)), default=0)


@SETTINGS
@given(STOPS, DATA)
def test_what_was_not_pending_is_never_taken_back(stops, data):
    matcher, released = StopMatcher(stops), 0
    for end in range(1, len(data) + 1):
        stop = matcher.push(data[end - 1])
        if stop is not None:
            assert end - len(stop) >= released
            break
        assert end - matcher.pending >= released
        released = end - matcher.pending


@SETTINGS
@given(STOPS, DATA, st.integers(0, 12))
def test_what_is_passed_over_is_forgotten_and_nothing_else(stops, data, early):
    """Of the bytes that come first, none ends a stop string that counts; one that ends later may have begun there."""
    matcher = StopMatcher(stops)
    for end in range(1, len(data) + 1):
        found = matcher.push(data[end - 1])
        assert found == max((stop for stop in stops if data[:end].endswith(stop)), key=len, default=None)
        if end <= early:
            matcher.pass_over()
            beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
            assert matcher.pending == max((len(b) for b in beginnings if data[:end].endswith(b)), default=0)


def test_all_256_bytes_may_stand_in_a_stop_string():
    everything = bytes(range(256))
    matcher = StopMatcher([everything])
    assert [matcher.push(byte) for byte in everything] == [None] * 255 + [everything]


def test_without_stop_strings_nothing_is_pending():
    matcher = StopMatcher(())
    assert matcher.push(97) is None
    assert matcher.pending == 0


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([b"a", b""])
