from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.text import BYTE_KEYS, TOKEN_ID_KEYS, TextDecoder, character_indices, incomplete_tail

# Bytes that make trouble are drawn as often as whole characters.
MESSY = st.lists(
    st.one_of(
        st.text(max_size=3).map(lambda text: text.encode("utf-8", "ignore")),
        st.sampled_from([b"\x80", b"\xc0", b"\xc3", b"\xe2", b"\xe2\x82", b"\xed\xa0", b"\xf0\x9f\x98", b"\xf4\x90"]),
        st.binary(max_size=3),
    ),
    max_size=20,
)


@given(MESSY)
def test_any_split_of_any_bytes_decodes_like_the_whole(parts: list[bytes]) -> None:
    decoder = TextDecoder()
    text = "".join(map(decoder.feed, parts)) + decoder.finish(drop_incomplete=False)
    assert text == b"".join(parts).decode("utf-8", "replace")


def can_become_a_character(beginning: bytes) -> bool:
    """Whether some bytes after `beginning` make one well-formed character of it."""
    for second in b"\x80\x90\xa0":
        for rest in (bytes((second,)), bytes((second, 0x80)), bytes((second, 0x80, 0x80))):
            character = (beginning + rest).decode("utf-8", "ignore")
            if len(character) == 1 and character.encode() == beginning + rest:
                return True
    return False


@given(MESSY)
def test_only_bytes_that_can_still_become_a_character_are_held_back(parts: list[bytes]) -> None:
    decoder = TextDecoder()
    for part in parts:
        decoder.feed(part)
        assert not decoder.pending or can_become_a_character(decoder.pending)


@given(MESSY)
def test_dropping_the_incomplete_end_leaves_the_whole_characters(parts: list[bytes]) -> None:
    data = b"".join(parts)
    decoder = TextDecoder()
    text = decoder.feed(data) + decoder.finish(drop_incomplete=True)
    tail = incomplete_tail(data)
    assert text == data[: len(data) - len(tail)].decode("utf-8", "replace")


@given(MESSY)
def test_bytes_know_the_index_of_their_character(parts: list[bytes]) -> None:
    data = b"".join(parts)
    indices = character_indices(data)
    text = data.decode("utf-8", "replace")
    assert len(indices) == len(data)
    assert sorted(set(indices)) == list(range(len(text)))
    for index, character in enumerate(text):
        own = bytes(byte for byte, at in zip(data, indices, strict=True) if at == index)
        assert own.decode("utf-8", "replace") == character


def test_a_bad_byte_is_shown_at_once_and_does_not_hold_up_what_follows() -> None:
    decoder = TextDecoder()
    assert decoder.feed(b"a\xff") == "a\ufffd"
    assert decoder.feed(b"\xe2\x82") == ""
    assert decoder.feed(b"b") == "\ufffdb"


def test_a_character_comes_whole_with_its_last_byte() -> None:
    decoder = TextDecoder()
    assert [decoder.feed(bytes((byte,))) for byte in "€😀".encode()] == ["", "", "€", "", "", "", "😀"]


def test_byte_keys_are_unambiguous_and_printable() -> None:
    assert len(set(BYTE_KEYS)) == 256
    assert len(set(TOKEN_ID_KEYS)) == 256
    assert BYTE_KEYS[0x41] == "A"
    assert BYTE_KEYS[0x20] == " "
    assert BYTE_KEYS[0x5C] == "\\\\"
    assert BYTE_KEYS[0x0A] == "\\x0a"
    assert BYTE_KEYS[0x7F] == "\\x7f"
    assert BYTE_KEYS[0xFE] == "\\xfe"
    assert TOKEN_ID_KEYS[7] == "token_id:7"
