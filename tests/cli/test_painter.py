"""Chunks in a terminal: marks and colours stand where chunks open, and nowhere else."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from hnet_runtime.engine.messages import Chunk
from server.cli.painter import ChunkPainter


def _chunks(*opened: tuple[int, int]) -> list[Chunk]:
    return [Chunk(stage, start, 0.9) for stage, start in opened]


def _paint(data: bytes, opened: list[Chunk], **options) -> str:
    painter = ChunkPainter(**{"colour": False, **options})
    painter.opened(opened)
    painter.add(data)
    return painter.finish()


def test_a_mark_stands_before_the_byte_that_opens_a_chunk():
    assert _paint(b"\xfeone two", _chunks((1, 0), (1, 4))) == "one| two"


def test_there_is_a_mark_for_every_stage():
    assert _paint(b"\xfeone two", _chunks((1, 0), (2, 0), (1, 3), (1, 5), (2, 5), (3, 5))) == "on|e |||two"


def test_text_does_not_begin_with_a_mark():
    assert _paint(b"\xfeone", _chunks((1, 0), (1, 1), (1, 2))) == "o|ne"


def test_boundary_inside_a_character_stands_before_it():
    data = "\u00fcber 日本".encode()
    assert _paint(b"\xfe" + data, _chunks((1, 2), (1, 8), (2, 9))) == "über ||日本"


def test_bytes_that_are_no_text_are_shown_as_such():
    assert _paint(b"\xfea\xff\xc3", _chunks((1, 2))) == "a|\ufffd\ufffd"


def test_a_prompt_without_bos_is_shown_whole():
    assert _paint(b"one", _chunks((1, 0), (1, 2))) == "on|e"


def test_offsets_count_from_the_prompt_where_only_the_rest_is_shown():
    assert _paint(b"two", _chunks((1, 0), (1, 5)), start=4) == "t|wo"


@pytest.mark.parametrize("colour", [False, True])
def test_in_pieces_is_as_at_once(colour):
    data = "\u00fcber den Hügeln 日本 zog".encode()
    opened = _chunks((1, 0), (1, 5), (2, 5), (1, 9), (1, 16), (1, 17), (2, 21))
    at_once = _paint(b"\xfe" + data, opened, colour=colour)
    painter = ChunkPainter(colour=colour)
    painter.add(b"\xfe")
    text = ""
    for offset, byte in enumerate(data, start=1):
        painter.opened(chunk for chunk in opened if chunk.start == offset - 1)
        painter.add(bytes([byte]))
        text += painter.take(hold=1)
    assert text + painter.finish() == at_once


def test_colours_change_where_chunks_open_and_end_with_the_text():
    text = _paint(b"\xfeone two six", _chunks((1, 0), (1, 4), (1, 8), (2, 8)), colour=True)
    runs = re.split(r"\x1b\[0m(?:\x1b\[(\d+)m)?", text)
    assert runs[::2] == ["one", " two", " six", ""]
    first, second = runs[1], runs[3]
    assert first != second
    assert text.endswith("\x1b[0m")


def test_neighbouring_chunks_differ_in_colour():
    text = _paint(b"\xfeabcd", _chunks((1, 1), (1, 2), (1, 3), (1, 4)), colour=True)
    colours = re.findall(r"\x1b\[(\d\d)m", text)
    assert len(colours) == 4
    assert all(one != other for one, other in pairwise(colours))


def test_only_the_text_is_cleaned():
    cleaned = _paint(b"\xfea\x1b[2Jb", _chunks((1, 2)), colour=True, clean=lambda text: text.replace("\x1b", "?"))
    assert "?[2J" in cleaned
    assert cleaned.startswith("a\x1b[0m\x1b[")
