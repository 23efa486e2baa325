"""One live request: what each byte means for it, and what it hands out when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.config import EOS
from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import ByteLogprobs, Chunk, Request, SamplingParams
from hnet_runtime.engine.request import LiveRequest
from hnet_runtime.engine.snapshots import ChunkHistory, Snapshot

PROMPT = b"\xfeHi"


def live(prompt: bytes = PROMPT, **params) -> LiveRequest:
    """A request whose prompt has run."""
    request = LiveRequest(Request(request_id="r", prompt=prompt, params=SamplingParams(**params)), 2, 0.0)
    request.admit(1, 1.0)
    request.prefilled(len(prompt), [], 2.0)
    return request


def entry(byte: int) -> ByteLogprobs:
    return ByteLogprobs(byte, -float(byte), ())


def push(request: LiveRequest, data: bytes) -> None:
    for byte in data:
        assert request.finish_reason is None, "bytes after the end"
        request.append(byte, entry(byte) if request.params.logprobs is not None else None)


# ── how it ends ───────────────────────────────────────────────────────────────────────────────


def test_eos_ends_it_and_is_in_neither_data_nor_usage():
    request = live(max_tokens=9)
    push(request, b"ab\xff")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"ab", "stop", EOS)
    assert output.usage.completion_bytes == 2


def test_eos_is_an_ordinary_byte_where_it_is_ignored():
    request = live(max_tokens=4, ignore_eos=True, utf8="raw")
    push(request, b"a\xff\xffb")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"a\xff\xffb", "length", None)


def test_max_tokens_ends_it():
    request = live(max_tokens=2)
    push(request, b"ab")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"ab", "length", None)


def test_max_tokens_1_ends_it_at_the_first_byte():
    request = live(max_tokens=1)
    push(request, b"x")
    assert request.take_output(3.0).data == b"x"


def test_max_tokens_0_ends_it_with_its_prompt():
    request = live(max_tokens=0)
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason) == (b"", "length")
    assert output.usage.completion_bytes == 0


def test_a_stop_string_at_the_last_byte_allowed_is_a_stop():
    request = live(max_tokens=3, stop=(b"bc",))
    push(request, b"abc")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"a", "stop", b"bc")
    assert output.usage.completion_bytes == 1


def test_the_longest_of_several_stop_strings_is_cut_out():
    request = live(max_tokens=9, stop=(b"c", b"abc", b"bc"))
    push(request, b"xabc")
    output = request.take_output(3.0)
    assert (output.data, output.stop_reason) == (b"x", b"abc")


def test_an_abort_hands_out_what_was_held_back():
    request = live(max_tokens=9, stop=(b"abc",), logprobs=0)
    push(request, b"xab")
    assert request.take_output(3.0).data == b"x"
    request.finish("abort")
    output = request.take_output(4.0)
    assert (output.data, output.finish_reason) == (b"ab", "abort")
    assert [logprob.byte for logprob in output.logprobs] == list(b"ab")


def test_a_prompt_does_not_count_towards_a_stop_string():
    request = live(b"\xfeab", max_tokens=3, stop=(b"abc",))
    push(request, b"cab")
    assert request.take_output(3.0).data == b"cab"


# ── stop bytes, and how soon it may end ───────────────────────────────────────────────────────


@pytest.mark.parametrize(("included", "data"), [(False, b"ab"), (True, b"ab\n")])
def test_a_stop_byte_ends_it_and_is_in_the_output_only_where_wanted(included, data):
    request = live(max_tokens=9, stop_token_ids=(10, 13), include_stop_str_in_output=included, logprobs=0)
    push(request, b"ab\n")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (data, "stop", 10)
    assert [logprob.byte for logprob in output.logprobs] == list(data)
    assert output.usage.completion_bytes == len(data)
    assert request.sequence(99) == PROMPT + data


def test_a_stop_string_that_is_wanted_stays_and_nothing_is_held_back_for_it():
    request = live(max_tokens=9, stop=(b"cde", b"xyz"), include_stop_str_in_output=True, logprobs=0)
    push(request, b"abcd")
    assert request.take_output(3.0).data == b"abcd"
    push(request, b"e")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"e", "stop", b"cde")
    assert output.usage.completion_bytes == 5
    assert request.sequence(8) == PROMPT + b"abcde"


def test_a_stop_byte_inside_a_character_leaves_what_had_come_of_it():
    request = live(max_tokens=9, stop_token_ids=(0xA9,))
    push(request, "aé".encode())
    assert request.take_output(3.0).data == b"a\xc3"
    whole = live(max_tokens=9, stop_token_ids=(0xA9,), include_stop_str_in_output=True)
    push(whole, "aé".encode())
    assert whole.take_output(3.0).data == "aé".encode()


@pytest.mark.parametrize("included", [False, True])
def test_eos_as_a_stop_byte_ends_it_though_it_is_ignored_and_is_never_in_the_output(included):
    options = {"max_tokens": 9, "ignore_eos": True, "stop_token_ids": (EOS,), "include_stop_str_in_output": included}
    request = live(**options)
    assert utf8.mask_table()[request.mask_row][EOS]
    push(request, b"ab\xff")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"ab", "stop", EOS)


def test_a_stop_string_that_ends_within_min_tokens_is_not_looked_for():
    request = live(max_tokens=20, min_tokens=3, stop=(b"aa",), logprobs=0)
    push(request, b"aaa")
    assert request.finish_reason is None
    assert request.take_output(3.0).data == b"aa"  # the last one may begin one that counts
    push(request, b"a")
    output = request.take_output(3.0)
    assert (output.data, output.finish_reason, output.stop_reason) == (b"", "stop", b"aa")
    assert output.usage.completion_bytes == 2


def test_the_bytes_of_a_stop_string_that_does_not_count_are_handed_out():
    request = live(max_tokens=20, min_tokens=3, stop=(b"abc",))
    push(request, b"abc")
    assert request.take_output(3.0).data == b"abc"


def test_the_bytes_allowed_are_told_only_while_more_than_well_formedness_decides():
    request = live(max_tokens=9, min_tokens=2)
    assert live(max_tokens=9, stop_token_ids=(10,)).allowed is None
    seen = []
    for byte in b"abc":
        seen.append(None if request.allowed is None else bool(request.allowed[EOS]))
        push(request, bytes([byte]))
    assert seen == [False, False, None]
    worded = live(max_tokens=9, bad_words=(b"bad",), utf8="raw")
    push(worded, b"xba")
    assert np.flatnonzero(~worded.allowed).tolist() == [ord("d")]


def test_penalties_count_what_the_output_has():
    request = live(max_tokens=9, frequency_penalty=1.0, stop_token_ids=(10,))
    push(request, b"aab\n")
    changed = request.penalties.apply(np.zeros(256, dtype=np.float32))
    assert {byte: changed[byte] for byte in np.flatnonzero(changed)} == {ord("a"): -2.0, ord("b"): -1.0}


# ── what is held back ─────────────────────────────────────────────────────────────────────────


def test_only_a_possible_beginning_of_a_stop_string_is_held_back():
    request = live(max_tokens=20, stop=(b"aab",), logprobs=0)
    gained = []
    for byte in b"xaaab":
        push(request, bytes([byte]))
        output = request.take_output(3.0)
        gained.append(output.data if output else None)
    assert gained == [b"x", None, None, b"a", b""]
    assert request.finish_reason == "stop"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    data=st.lists(st.sampled_from(b"ab\xff"), min_size=1, max_size=30).map(bytes),
    stops=st.lists(st.lists(st.sampled_from(b"ab"), min_size=1, max_size=4).map(bytes), max_size=3),
    max_tokens=st.integers(1, 25),
    ignore_eos=st.booleans(),
    taken=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_outputs_put_together_are_the_text_up_to_its_end(data, stops, max_tokens, ignore_eos, taken):
    """However often outputs are taken, they join to what a look at the whole text says."""
    request = live(max_tokens=max_tokens, stop=tuple(stops), ignore_eos=ignore_eos, utf8="raw", logprobs=1)
    expected, reason, cause = data, None, None
    for end in range(1, len(data) + 1):
        if data[end - 1] == EOS and not ignore_eos:
            expected, reason, cause = data[: end - 1], "stop", EOS
            break
        found = max((stop for stop in stops if data[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            expected, reason, cause = data[: end - len(found)], "stop", found
            break
        if end == max_tokens:
            expected, reason = data[:end], "length"
            break

    gained, logprobs, last = b"", [], None
    for byte, take in zip(data, taken, strict=False):
        push(request, bytes([byte]))
        if take or request.finish_reason:
            output = request.take_output(3.0)
            if output is not None:
                assert last is None
                gained += output.data
                logprobs += output.logprobs
                last = output if output.finish_reason else None
        if request.finish_reason:
            break
    assert request.finish_reason == reason
    if reason is None:
        output = request.take_output(3.0)
        pending = max((n for stop in stops for n in range(len(stop)) if data.endswith(stop[:n])), default=0)
        rest = output.data if output is not None else b""
        logprobs += output.logprobs if output is not None else ()
        assert gained + rest == data[: len(data) - pending]
        gained += rest
    else:
        assert gained == expected
        assert last.stop_reason == cause
        assert last.usage.completion_bytes == len(expected)
    assert [logprob.byte for logprob in logprobs] == list(gained)


# ── what else it gains ────────────────────────────────────────────────────────────────────────


def test_nothing_new_is_no_output():
    request = live(max_tokens=5)
    assert request.take_output(3.0) is None
    push(request, b"a")
    assert request.take_output(3.0).data == b"a"
    assert request.take_output(3.0) is None


def test_chunks_are_counted_always_and_told_in_order_where_asked_for():
    chunks = [Chunk(2, 0, 1.0), Chunk(1, 3, 0.75), Chunk(1, 0, 1.0)]
    told, silent = live(max_tokens=5, return_chunks=True), live(max_tokens=5)
    for request in (told, silent):
        request.saw_chunks(chunks)
        request.append(97, None)
    assert told.take_output(3.0).chunks == (chunks[2], chunks[0], chunks[1])
    assert silent.take_output(3.0).chunks == ()
    for request in (told, silent):
        request.finish("abort")
        assert request.take_output(4.0).usage.chunks == (2, 1)


def test_chunks_alone_make_an_output():
    request = live(max_tokens=5, return_chunks=True, stop=(b"ab",))
    push(request, b"a")
    request.saw_chunks([Chunk(1, 3, 0.9)])
    output = request.take_output(3.0)
    assert (output.data, output.chunks) == (b"", (Chunk(1, 3, 0.9),))


def test_prompt_logprobs_come_once_when_the_prompt_has_run():
    params = SamplingParams(max_tokens=5, prompt_logprobs=0)
    request = LiveRequest(Request(request_id="r", prompt=b"\xfeabc", params=params), 1, 0.0)
    request.admit(1, 1.0)
    request.prefilled(2, [entry(97)], 1.5)
    assert request.is_prefilling
    assert request.take_output(1.6) is None
    request.prefilled(4, [entry(98), entry(99)], 2.0)
    request.append(120, None)
    output = request.take_output(2.1)
    assert [logprob.byte for logprob in output.prompt_logprobs] == [97, 98, 99]
    assert output.data == b"x"
    push(request, b"y")
    assert request.take_output(2.2).prompt_logprobs == ()


def test_usage_tells_where_the_time_went():
    request = LiveRequest(Request(request_id="r", prompt=PROMPT, params=SamplingParams(max_tokens=2)), 1, 10.0)
    request.admit(3, 11.0)
    request.prefilled(3, [], 14.0)
    push(request, b"ab")
    usage = request.take_output(19.0).usage
    assert (usage.queue_seconds, usage.prefill_seconds, usage.decode_seconds) == (1.0, 3.0, 5.0)
    assert usage.prompt_bytes == 3


def test_a_request_that_never_ran_has_only_waited():
    request = LiveRequest(Request(request_id="r", prompt=PROMPT, params=SamplingParams()), 1, 10.0)
    request.finish("abort")
    usage = request.take_output(15.0).usage
    assert (usage.queue_seconds, usage.prefill_seconds, usage.decode_seconds) == (5.0, 0.0, 0.0)


@pytest.mark.parametrize(("max_tokens", "positions"), [(0, 3), (1, 3), (2, 4), (100, 102)])
def test_the_last_byte_is_never_fed(max_tokens, positions):
    assert live(max_tokens=max_tokens).max_positions == positions


# ── the mask of its next byte ─────────────────────────────────────────────────────────────────


def test_the_mask_follows_the_bytes_and_what_remains():
    request = live(max_tokens=4)
    seen = [request.mask_row]
    for byte in "a€".encode():
        push(request, bytes([byte]))
        seen.append(request.mask_row)
    state = utf8.advance(utf8.START, 0xE2)
    inner = utf8.advance(state, 0x82)
    assert seen[:4] == [
        utf8.mask_row(utf8.START, 4, True),
        utf8.mask_row(utf8.START, 3, True),
        utf8.mask_row(state, 2, True),
        utf8.mask_row(inner, 1, True),
    ]
    assert request.finish_reason == "length"


def test_the_mask_begins_inside_the_character_that_the_prompt_ends_in():
    request = live(b"\xfe" + "🦊".encode()[:2], max_tokens=9)
    table = utf8.mask_table()[request.mask_row]
    assert set(table.nonzero()[0].tolist()) == set(range(0x80, 0xC0))


def test_raw_masks_nothing_and_ignore_eos_masks_eos_in_strict():
    assert live(utf8="raw").mask_row == utf8.ANY_BYTE
    assert utf8.mask_table()[live().mask_row][EOS]
    assert not utf8.mask_table()[live(ignore_eos=True).mask_row][EOS]


# ── snapshots, parking, preemption ────────────────────────────────────────────────────────────


def prefilling(prompt: bytes, **params) -> LiveRequest:
    return LiveRequest(Request(request_id="r", prompt=prompt, params=SamplingParams(**params)), 2, 0.0)


def test_snapshots_are_due_at_intervals_where_wanted_and_at_the_prompt_s_end():
    request = prefilling(b"x" * 100)
    for point in (70, 10, 70):
        request.want_snapshot(point)
    seen = []
    while request.is_prefilling:
        request.fed = request.next_snapshot(32)
        seen.append(request.fed)
    assert seen == [10, 32, 64, 70, 96, 100]
    request.fed = 11
    assert request.next_snapshot(None) == 70


def test_what_ends_while_it_waits_counts_that_wait():
    request = live(max_tokens=9)
    request.park(1, tick=5, now=10.0)
    request.finish("abort")
    output = request.take_output(13.0)
    assert output is not None
    assert output.usage is not None
    assert output.usage.park_seconds == 3.0


def test_time_parked_and_preemptions_are_told_in_the_end():
    request = live(max_tokens=9)
    request.park(1, tick=5, now=10.0)
    assert request.unpark(12.0) == 2.0
    request.park(2, tick=7, now=20.0)
    request.swap_out("memory", 21.0)
    assert (request.row, request.swapped, request.due) == (None, "memory", 2)
    request.swap_in(3, tick=9, now=30.0)
    assert (request.row, request.swapped, request.parked_tick) == (3, None, 9)
    assert request.unpark(31.0) == 1.0
    assert request.due == 0
    request.finish("abort")
    usage = request.take_output(32.0).usage
    assert (usage.park_seconds, usage.preemptions, usage.cached_bytes) == (4.0, 1, 0)


def test_what_a_snapshot_knows_is_as_if_it_had_run():
    history = ChunkHistory()
    history.add([Chunk(1, 0, 1.0), Chunk(2, 0, 1.0), Chunk(1, 2, 0.75)])
    snapshot = Snapshot(3, None, (), history, None, 1)
    request = prefilling(b"abcd", return_chunks=True, max_tokens=0)
    request.admit(1, 1.0, snapshot)
    assert (request.fed, request.is_prefilling, request.chunk_counts) == (3, True, [2, 1])
    request.saw_chunks([Chunk(1, 3, 0.5)])
    request.prefilled(4, [], 2.0)
    output = request.take_output(3.0)
    assert [(chunk.start, chunk.stage) for chunk in output.chunks] == [(0, 1), (0, 2), (2, 1), (3, 1)]
    assert (output.usage.cached_bytes, output.usage.chunks, output.opened) == (3, (3, 1), 0)
    assert len(history) == 3  # it is the snapshot's


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2**31 - 1), st.floats(0, 1, width=32)), max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_history_gives_back_exactly_what_it_was_given(chunks):
    history = ChunkHistory()
    history.add(Chunk(*chunk) for chunk in chunks)
    copy = history.copy()
    history.add([Chunk(1, 1, 0.5)])
    assert list(copy) == [Chunk(*chunk) for chunk in chunks]
    assert copy.num_bytes == 9 * len(chunks)


def test_a_sequence_is_what_was_fed_with_the_stop_string_that_was_cut_out():
    request = live(b"\xfeab", max_tokens=9, stop=(b"cd",))
    push(request, b"xcd")
    assert request.take_output(3.0).data == b"x"
    assert request.sequence(5) == b"\xfeabxc"
    assert request.sequence(6) == b"\xfeabxcd"
