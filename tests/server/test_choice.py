from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet_runtime.engine.messages import ByteLogprobs, Chunk, Output, Usage
from server.choice import Choice, ChoiceOptions

USAGE = Usage(
    prompt_bytes=1, completion_bytes=1, chunks=(1,), queue_seconds=0.0, prefill_seconds=0.0, decode_seconds=0.0
)


def scored(data: bytes) -> tuple[ByteLogprobs, ...]:
    return tuple(ByteLogprobs(byte, -float(byte + 1), ((0, -1.0), (1, -2.0))) for byte in data)


def whole(prompt: bytes, data: bytes, **options: Any) -> dict[str, Any]:
    """The choice of a response that does not stream."""
    choice = Choice(0, prompt, ChoiceOptions(**options))
    choice.add(
        Output(
            request_id="r",
            data=data,
            logprobs=scored(data),
            prompt_logprobs=scored(prompt[1:]),
            chunks=(Chunk(1, 0, 1.0), Chunk(2, 0, 1.0), Chunk(1, 4, 0.6)),
            finish_reason="length",
            usage=USAGE,
        )
    )
    taken = choice.take()
    assert taken is not None
    return taken


def streamed(prompt: bytes, parts: list[bytes], **options: Any) -> list[dict[str, Any]]:
    """The events of the same completion, its bytes arriving in `parts`."""
    choice = Choice(0, prompt, ChoiceOptions(**options))
    taken = []
    outputs = [Output(request_id="r", prompt_logprobs=scored(prompt[1:]), chunks=(Chunk(1, 0, 1.0), Chunk(2, 0, 1.0)))]
    outputs += [Output(request_id="r", data=part, logprobs=scored(part)) for part in parts]
    outputs += [Output(request_id="r", chunks=(Chunk(1, 4, 0.6),), finish_reason="length", usage=USAGE)]
    for output in outputs:
        choice.add(output)
        taken.append(choice.take())
    return [event for event in taken if event is not None]


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The events of a stream put together."""
    result = dict(events[-1])
    result["text"] = "".join(event["text"] for event in events)
    for name in ("token_ids", "chunks"):
        if name in result:
            result[name] = [item for event in events for item in event[name]]
    if "prompt_token_ids" in events[0]:
        result["prompt_token_ids"] = events[0]["prompt_token_ids"]
    if result["logprobs"] is not None:
        names = result["logprobs"]
        result["logprobs"] = {name: [item for event in events for item in event["logprobs"][name]] for name in names}
    return result


@given(
    prompt=st.one_of(
        st.text(min_size=1).map(lambda text: b"\xfe" + text.encode("utf-8", "ignore")), st.binary(min_size=1)
    ),
    parts=st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=3).map(lambda t: t.encode("utf-8", "ignore")))),
    echo=st.booleans(),
    strict=st.booleans(),
    interval=st.integers(1, 5),
)
def test_the_events_of_a_stream_add_up_to_the_whole_response(
    prompt: bytes, parts: list[bytes], echo: bool, strict: bool, interval: int
) -> None:
    options = {"echo": echo, "strict": strict, "logprobs": 1, "return_token_ids": True, "return_chunks": True}
    events = streamed(prompt, parts, stream_interval=interval, **options)
    assert joined(events) == whole(prompt, b"".join(parts), **options)
    assert all(event["text"] for event in events[:-1])
    assert all(event["finish_reason"] is None for event in events[:-1])


@given(st.text(), st.text(min_size=1))
def test_echoed_offsets_point_at_the_characters_of_the_text(prompt: str, answer: str) -> None:
    prompt_bytes, data = (text.encode("utf-8", "ignore") for text in (prompt, answer))
    choice = whole(b"\xfe" + prompt_bytes, data, echo=True, logprobs=0)
    logprobs = choice["logprobs"]
    assert choice["text"] == (prompt_bytes + data).decode()
    assert logprobs["token_ids"] == [254, *prompt_bytes, *data]
    characters = [character for character in choice["text"] for _ in character.encode()]
    assert [choice["text"][offset] for offset in logprobs["text_offset"][1:]] == characters
    assert {len(column) for column in logprobs.values()} == {1 + len(prompt_bytes) + len(data)}


def test_the_first_echoed_entry_is_null_because_nothing_predicts_it() -> None:
    logprobs = whole(b"\xfeab", b"c", echo=True, logprobs=1)["logprobs"]
    assert logprobs["tokens"] == ["\\xfe", "a", "b", "c"]
    assert logprobs["token_logprobs"] == [None, -98.0, -99.0, -100.0]
    assert logprobs["top_logprobs"] == [
        None,
        {"\\x00": -1.0, "a": -98.0},
        {"\\x00": -1.0, "b": -99.0},
        {"\\x00": -1.0, "c": -100.0},
    ]
    assert logprobs["text_offset"] == [0, 0, 1, 2]
    assert logprobs["bytes"] == [[254], [97], [98], [99]]


def test_a_prompt_that_begins_with_another_byte_than_bos_is_echoed_from_its_first() -> None:
    choice = whole(b"ab", b"c", echo=True, logprobs=0)
    assert choice["text"] == "abc"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["token_logprobs"][0] is None


def test_logprobs_0_lists_the_byte_itself_alone() -> None:
    assert whole(b"\xfe", b"c", logprobs=0)["logprobs"]["top_logprobs"] == [{"c": -100.0}]


def test_a_byte_among_the_alternatives_is_listed_once() -> None:
    choice = Choice(0, b"\xfe", ChoiceOptions(logprobs=2))
    entry = ByteLogprobs(1, -2.0, ((0, -1.0), (1, -2.0)))
    choice.add(Output(request_id="r", data=b"\x01", logprobs=(entry,), finish_reason="length"))
    taken = choice.take()
    assert taken is not None
    assert taken["logprobs"]["top_logprobs"] == [{"\\x00": -1.0, "\\x01": -2.0}]


def test_minus_infinity_is_a_number_that_json_can_say() -> None:
    choice = Choice(0, b"\xfe", ChoiceOptions(logprobs=1))
    entry = ByteLogprobs(1, float("-inf"), ((0, float("-inf")),))
    choice.add(Output(request_id="r", data=b"\x01", logprobs=(entry,), finish_reason="length"))
    taken = choice.take()
    assert taken is not None
    assert taken["logprobs"]["token_logprobs"] == [-9999.0]


def test_a_prompt_that_ends_inside_a_character_lets_the_whole_character_open_the_text() -> None:
    choice = whole(b"\xfeab\xe2\x82", b"\xac!", strict=True, logprobs=0, return_token_ids=True)
    assert choice["text"] == "€!"
    assert choice["token_ids"] == [0xAC, 0x21]
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_echo_of_such_a_prompt_shows_the_character_once() -> None:
    assert whole(b"\xfeab\xe2\x82", b"\xac!", strict=True, echo=True)["text"] == "ab€!"
    events = streamed(b"\xfeab\xe2\x82", [b"\xac", b"!"], strict=True, echo=True, logprobs=0)
    assert [event["text"] for event in events] == ["ab", "€", "!", ""]
    assert joined(events)["logprobs"]["text_offset"] == [0, 0, 1, 2, 2, 2, 3]


def test_raw_text_shows_each_ill_formed_part_as_one_sign() -> None:
    choice = whole(b"\xfeab\xe2\x82", b"\xac\xff\xe2\x82", strict=False, return_token_ids=True, logprobs=0)
    assert choice["text"] == "\ufffd\ufffd\ufffd"
    assert choice["token_ids"] == [0xAC, 0xFF, 0xE2, 0x82]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2]


@pytest.mark.parametrize(("strict", "text"), [(True, "a"), (False, "a\ufffd")])
def test_a_character_cut_by_the_end_is_dropped_in_strict_mode_alone(strict: bool, text: str) -> None:
    choice = whole(b"\xfe", b"a\xe2\x82", strict=strict, return_token_ids=True)
    assert choice["text"] == text
    assert choice["token_ids"] == [0x61, 0xE2, 0x82]


def test_an_event_never_splits_a_character_and_its_arrays_belong_to_its_text() -> None:
    events = streamed(b"\xfe", [b"a\xe2", b"\x82", b"\xacb"], logprobs=0, return_token_ids=True)
    assert [event["text"] for event in events] == ["a", "€b", ""]
    assert [event["token_ids"] for event in events] == [[0x61], [0xE2, 0x82, 0xAC, 0x62], []]
    assert [event["logprobs"]["token_ids"] for event in events] == [[0x61], [0xE2, 0x82, 0xAC, 0x62], []]
    assert ["prompt_token_ids" in event for event in events] == [True, False, False]


def test_verdicts_wait_for_the_text_and_the_last_event_has_the_rest() -> None:
    events = streamed(b"\xfe", [b"a"], return_chunks=True)
    assert [[chunk["start"] for chunk in event["chunks"]] for event in events] == [[0, 0], [4]]


def test_an_error_ends_a_choice_with_the_text_so_far() -> None:
    choice = Choice(3, b"\xfeab", ChoiceOptions(echo=True, logprobs=1))
    choice.add(Output(request_id="r", finish_reason="error", error="not a number"))
    taken = choice.take()
    assert taken is not None
    assert (taken["finish_reason"], taken["error"], taken["text"]) == ("error", "not a number", "ab")
    assert taken["logprobs"]["token_logprobs"] == [None, None, None]


def test_the_stop_that_matched_is_told_as_text_or_byte() -> None:
    for reason, told in ((b"\n\n", "\n\n"), (255, 255)):
        choice = Choice(0, b"\xfe", ChoiceOptions())
        choice.add(Output(request_id="r", finish_reason="stop", stop_reason=reason))
        taken = choice.take()
        assert taken is not None
        assert taken["stop_reason"] == told
