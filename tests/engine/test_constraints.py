"""Constraints by themselves: what a cursor allows is what the constraint means, byte for byte."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet_runtime.config import EOS
from hnet_runtime.engine import byte_tables, constraints
from hnet_runtime.engine.constraints import ConstraintError, Cursor, Grammar, Table, compile_constraint
from hnet_runtime.engine.messages import Constraint

REGEXES = [
    "ab|a[0-9]",
    "[0-9]{3}-[0-9]{4}",
    "é+|世界",
    "(?i)hello( world)?",
    "^a*b$",
    r"\d{1,3}(,\d{3})*",
    "(foo|bar)*baz",
    r"[^a-z\n]{2,5}",
    r"(a|b)*a(a|b){3}",
    r".{0,3}\$",
    r"(?s).{0,3}\$",
]


def of(kind: str, source: str, **options: object) -> Constraint:
    return Constraint(kind=kind, source=source, **options)  # type: ignore[arg-type]


def begin(kind: str, source: str, **options: object) -> Cursor:
    return compile_constraint(of(kind, source, **options)).begin()


def accepts(cursor: Cursor, data: bytes) -> bool:
    for byte in data:
        if byte == EOS or not cursor.mask[byte]:
            return False
        cursor.advance(bytes((byte,)))
    return bool(cursor.mask[EOS])


def write(cursor: Cursor, rng: random.Random, most: int = 60) -> tuple[bytes, bool]:
    """A walk at random, and whether it came to an end."""
    data = bytearray()
    while len(data) < most:
        allowed = cursor.mask.nonzero()[0].tolist()
        assert allowed, "nothing may follow"
        byte = rng.choice(allowed)
        if byte == EOS:
            return bytes(data), True
        data.append(byte)
        cursor.advance(bytes((byte,)))
    return bytes(data), False


def parser_of(pattern: str) -> Cursor:
    """llguidance's own, for an expression that has a table."""
    with mock.patch.object(constraints, "regex_table", return_value=None):
        compiled = compile_constraint(of("regex", pattern))
    assert isinstance(compiled, Grammar)
    return compiled.begin()


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_regular_expression_is_what_python_takes_it_for(pattern: str) -> None:
    compiled = compile_constraint(of("regex", pattern))
    assert isinstance(compiled, Table)
    rng = random.Random(pattern)
    alphabet = "ab0129,-fozé世界HeLlo world$\n"
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(9)))
        assert accepts(compiled.begin(), text.encode()) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_table_and_the_parser_agree_everywhere(pattern: str) -> None:
    rng = random.Random(pattern)
    for _ in range(12):
        table, parser = begin("regex", pattern), parser_of(pattern)
        for _ in range(25):
            assert (table.mask == parser.mask).all()
            assert table.forced == parser.forced
            allowed = table.mask.nonzero()[0].tolist()
            byte = rng.choice(allowed if rng.random() < 0.6 else [*[b for b in allowed if b >= 0x80], allowed[0]])
            if byte == EOS:
                break
            for cursor in (table, parser):
                cursor.advance(bytes((byte,)))


@given(st.lists(st.text(max_size=6), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_a_choice_is_one_of_its_texts(texts: list[str]) -> None:
    compiled = compile_constraint(of("choice", json.dumps(texts)))
    for text in texts:
        assert accepts(compiled.begin(), text.encode())
        assert accepts(compiled.begin(), text.encode() + b"x") == (text + "x" in texts)
    for seed in range(5):
        data, ended = write(compiled.begin(), random.Random(seed))
        assert ended
        assert data.decode() in texts


def test_a_choice_of_more_states_than_a_table_has_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"number {index}" for index in range(40)]
    monkeypatch.setattr(byte_tables, "MAX_STATES", 16)
    compiled = compile_constraint(of("choice", json.dumps(texts)))
    assert isinstance(compiled, Grammar)
    assert accepts(compiled.begin(), b"number 7")
    assert not accepts(compiled.begin(), b"number 70")
    assert isinstance(compile_constraint(of("regex", "a{20}")), Grammar)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "The answer is (42|43), of course[.]"),
        ("choice", '["forty", "forty-two", "fortitude"]'),
        ("json", '{"type": "object", "properties": {"name": {"const": "Ann"}}, "required": ["name"]}'),
        ("grammar", 'start: "a" b+ "end"\nb: "bcd" | "bce"'),
    ],
)
def test_forced_bytes_are_those_that_stand_alone_one_after_the_other(kind: str, source: str) -> None:
    compiled = compile_constraint(of(kind, source, whitespace=""))
    found_some = False
    for seed in range(8):
        rng = random.Random(seed)
        cursor = compiled.begin()
        for _ in range(40):
            forced = cursor.forced
            if forced:
                found_some = True
                assert cursor.permits(forced)
                for byte in forced:
                    assert cursor.mask.nonzero()[0].tolist() == [byte]
                    cursor.advance(bytes((byte,)))
            allowed = cursor.mask.nonzero()[0].tolist()
            assert len(allowed) > 1 or allowed == [EOS]
            byte = rng.choice(allowed)
            if byte == EOS:
                break
            cursor.advance(bytes((byte,)))
    assert found_some


@pytest.mark.parametrize("make", [lambda pattern: begin("regex", pattern), parser_of])
def test_permits_looks_ahead_and_changes_nothing(make: Callable[[str], Cursor]) -> None:
    cursor = make("(ab|é)+c")
    before = cursor.mask.copy()
    assert cursor.permits("abéc".encode())
    assert not cursor.permits(b"ac")
    assert not cursor.permits(b"abcd")
    assert cursor.permits("é".encode()[:1])
    assert (cursor.mask == before).all()


def test_tables_have_no_state_without_an_end() -> None:
    table = byte_tables.regex_table(r"a(\d|b)c|d\d", lambda source: ())  # where no character is of a class
    assert table is not None
    assert table.num_states == 4
    assert table.forced(0) == b"abc"
    assert byte_tables.regex_table(r"a\d", lambda source: ()) is None


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"[^\s\S]", "NoExtension"),
        ("json", '{"not": {}}', '"not"'),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"type": "string", "format": "colour"}', "colour"),
        ("json", '{"$ref": "http://127.0.0.1:9/x"}', "http://127.0.0.1:9/x"),
        ("json", '{"type": "integer", "minimum": 3, "maximum": 2}', "minimum"),
        ("json", "{", "Expecting"),
        ("grammar", "start: b", '"b"'),
        ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("regex", "a" * 70_000, "65536"),
    ],
)
def test_what_cannot_be_enforced_is_named(kind: str, source: str, words: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        compile_constraint(of(kind, source))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_work_for_a_byte_is_bounded() -> None:
    """A grammar whose parse takes ever more places is given up rather than followed."""
    cursor = begin("grammar", 'start: a\na: a a | "x" | a a a')

    def follow() -> None:
        for _ in range(3000):
            cursor.advance(b"x")

    with pytest.raises(ConstraintError):
        follow()


@pytest.mark.parametrize(
    "pattern",
    ["[ab]*a[ab]{16}", "(((a{99}){99}){99})", "(a?){6000}a{6000}", r"(\w{1,9}@){1,90}", "(" * 120 + "a" + ")*" * 120],
)
def test_an_expression_that_is_too_large_for_a_table_is_parsed(pattern: str) -> None:
    assert isinstance(compile_constraint(of("regex", pattern)), Grammar)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?P<n>a)\d",
        "[[:alpha:]]b",
        "[a-z&&[^c]]",
        r"\p{Greek}",
        r"[^\d\s]",
        "[^]a-c]",
        r"[^\w]",
        "a{2,}?",
        "(?i)ß[a-k]",
        "[-a]",
        "[a-]",
    ],
)
def test_the_dialect_is_the_parsers(pattern: str) -> None:
    """Also where another one, such as Python's, means something else."""
    rng = random.Random(pattern)
    cursor, parser = begin("regex", pattern), parser_of(pattern)
    while not cursor.mask[EOS]:
        assert (cursor.mask == parser.mask).all()
        byte = rng.choice(cursor.mask.nonzero()[0].tolist())
        cursor.advance(bytes((byte,)))
        parser.advance(bytes((byte,)))
    assert (cursor.mask == parser.mask).all()


@given(st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF)).map(sorted).map(tuple), max_size=4))
@settings(max_examples=25, deadline=None)
def test_code_points_and_their_bytes_are_the_same(ranges: list[tuple[int, int]]) -> None:
    sequences = byte_tables.utf8_sequences(byte_tables.complement(byte_tables.complement(ranges)))
    found = byte_tables.code_points(sequences)
    borders = {point for low, high in ranges for end in (low, high) for point in range(end - 2, end + 3)}
    for point in borders & set(range(0xD800)) | borders & set(range(0xE000, 0x110000)):
        assert any(low <= point <= high for low, high in found) == any(low <= point <= high for low, high in ranges)
        data = chr(point).encode()
        matches = [
            len(sequence) == len(data)
            and all(low <= byte <= high for byte, (low, high) in zip(data, sequence, strict=True))
            for sequence in sequences
        ]
        assert sum(matches) == any(low <= point <= high for low, high in ranges)
