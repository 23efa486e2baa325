"""A stream as its client saw it: whole, or what is wrong with it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from loadtests.stream import Record, StreamReader


def event(document: Any) -> bytes:
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


def text(piece: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"text": piece, "finish_reason": reason}]})


def delta(piece: str | None, reason: str | None = None) -> bytes:
    return event({"choices": [{"delta": {} if piece is None else {"content": piece}, "finish_reason": reason}]})


def usage(told: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": told}})


DONE = event(b"[DONE]")
WHOLE = text("añ") + b": still there\n\n" + text("b", "length") + usage(4) + DONE


def read(stream: bytes, piece: int = 1 << 20, *, counts_bytes: bool = True) -> Record:
    """Pieces come one a second from 1 on."""
    record = Record("short", 1, due=0.5)
    reader = StreamReader(record, counts_bytes=counts_bytes)
    now = 0
    for now, start in enumerate(range(0, len(stream), piece), start=1):
        reader.feed(stream[start : start + piece], now)
    reader.close(now + 1)
    return record


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_a_whole_stream_is_complete_however_it_is_cut(piece: int) -> None:
    record = read(WHOLE, piece)
    assert (record.outcome, record.text, record.reason) == ("complete", "añb", "length"), record.detail
    assert [so_far for _, so_far in record.arrivals] == [3, 4]
    assert (record.prompt_tokens, record.completion_tokens) == (7, 4)


def test_times_are_those_at_which_pieces_came() -> None:
    record = Record("short", 1, due=0.5)
    reader = StreamReader(record, counts_bytes=True)
    for now, piece in ((1.0, text("a")), (3.0, text("bc")), (3.5, text("d", "length") + usage(4) + DONE)):
        reader.feed(piece, now)
    reader.close(4.0)
    assert record.first_byte == 0.5
    assert record.gaps == [2.0, 0.5]
    assert record.rate == 3 / 2.5
    assert record.end == 4.0


def test_a_chats_stream_is_read_by_its_deltas() -> None:
    record = read(delta("") + delta("hi") + delta(None, "stop") + usage(2) + DONE)
    assert (record.outcome, record.text, len(record.arrivals)) == ("complete", "hi", 1)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (WHOLE.replace(DONE, b""), "no .DONE."),
        (WHOLE + text("more"), "after .DONE."),
        (text("a") + usage(1) + DONE, "no finish_reason"),
        (text("a", "length") + DONE, "no usage"),
        (text("a", "length") + text("b") + usage(2) + DONE, "after the end"),
        (text("a", "length") + event({"choices": [{"text": "", "finish_reason": "stop"}]}) + usage(1) + DONE, "twice"),
        (WHOLE.replace(b'"completion_tokens": 4', b'"completion_tokens": 5'), "says 5 bytes, and 4 came"),
        (event(b"{") + WHOLE, "an event is none"),
        (b"", "no .DONE."),
    ],
)
def test_a_stream_that_is_not_whole_is_broken_and_says_how(stream: bytes, said: str) -> None:
    record = read(stream)
    assert record.outcome == "broken"
    assert re.search(said, record.detail or ""), record.detail


def test_a_stop_string_is_counted_and_not_shown() -> None:
    assert read(text("a", "stop") + usage(3) + DONE).outcome == "complete"
    assert read(text("abcd", "stop") + usage(3) + DONE).outcome == "broken"


def test_a_peers_tokens_are_no_bytes() -> None:
    assert read(text("four", "length") + usage(1) + DONE, counts_bytes=False).outcome == "complete"


def test_an_error_in_the_stream_is_a_failure_in_its_words() -> None:
    record = read(text("a") + event({"error": {"code": "engine_failed", "message": "it died"}}) + DONE)
    assert (record.outcome, record.reason, record.detail, record.text) == ("failed", "engine_failed", "it died", "a")


def test_what_a_client_cuts_is_no_fault_of_the_stream() -> None:
    record = Record("short", 1, due=0.0)
    reader = StreamReader(record, counts_bytes=True)
    reader.feed(text("a"), 1.0)
    reader.close(2.0, "aborted")
    assert (record.outcome, record.num_bytes, record.end) == ("aborted", 1, 2.0)


def test_a_record_is_the_same_after_its_line() -> None:
    record = read(WHOLE)
    assert Record.from_json(record.to_json()) == record
