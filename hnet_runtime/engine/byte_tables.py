"""Regular languages as tables of states × bytes, which a sampler can keep beside it.

A regular expression is read as far as its structure goes: groups, alternatives, repetitions, characters between them.
Which ones `[…]`, `\\w` or `.` stand for is either plain to see, or asked of whoever knows the dialect. What is not read
here has no table. Work and size are bounded. Knows bytes; no constraints and no requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from hnet_runtime.config import EOS, VOCAB_SIZE

MAX_STATES = 2048  # of a table
MAX_PLACES = 1 << 14  # of the automaton with choices that a table is made from
MAX_WORK = 1 << 21  # edges looked at to make it
MAX_DEPTH = 100  # of groups

Ranges = tuple[tuple[int, int], ...]  # of bytes, or of code points, both ends included
Sequences = tuple[Ranges, ...]  # each a sequence of byte ranges
CharacterClass = Callable[[str], Sequences]
"""From the source of one character class to the byte sequences of its characters; raises ValueError if it is none."""

_LAST = 0x10FFFF
_FLAGS = re.compile(r"\(\?[is]+\)")
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_]\w*>|:))?")
_REPEAT = re.compile(r"[*+?]|\{(?P<least>\d{1,5})(?P<comma>,(?P<most>\d{1,5})?)?\}", re.ASCII)
_NAMED_CLASS = re.compile(r"\\(?:[dDsSwW]|[pP](?:\{[^{}]*\}|[A-Z]))")
# Sets in which nothing has a meaning of its own but `-` between two characters, and a backslash before punctuation.
_ITEM = r"(?:[^\\\[\]&~^-]|\\[^A-Za-z0-9_\s]|\\[nrtfv])"
_RANGE = re.compile(rf"(?P<low>{_ITEM})(?:-(?P<high>{_ITEM}))?")
_PLAIN_SET = re.compile(rf"\[(?P<negated>\^?)(?P<items>(?:{_ITEM}(?:-{_ITEM})?)+)\]")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_PUNCTUATION = frozenset(r"\.+*?()|[]{}^$#&-~/")


class TooLarge(Exception):
    """More states, edges or work than a table may take."""


class NotRead(Exception):
    """Something that is left to others."""


class ByteTable:
    """An automaton of S states, state 0 first; from every state some end can be reached.

    allowed: [S, V] the bytes that may come, and at `EOS` whether this may be the end; following: [S, V] int16, the next
    state, −1 where there is none.
    """

    def __init__(self, edges: list[dict[int, int]], finals: Iterable[int]) -> None:
        self.following = np.full((len(edges), VOCAB_SIZE), -1, dtype=np.int16)
        for state, followers in enumerate(edges):
            self.following[state, list(followers)] = list(followers.values())
        self.allowed = self.following >= 0
        self.allowed[sorted(finals), EOS] = True
        self._forced: dict[int, bytes] = {}

    @property
    def num_states(self) -> int:
        return len(self.allowed)

    def forced(self, state: int) -> bytes:
        """The bytes that have to come after a state. There are finally many, since every state has an end."""
        found = self._forced.get(state)
        if found is None:
            data, at = bytearray(), state
            while self.allowed[at].sum() == 1 and not self.allowed[at, EOS]:
                byte = int(self.allowed[at].argmax())
                data.append(byte)
                at = int(self.following[at, byte])
            found = self._forced[state] = bytes(data)
        return found


def choice_table(choices: Iterable[bytes]) -> ByteTable | None:
    """A table of the given texts; None where it would have more than MAX_STATES states."""
    edges: list[dict[int, int]] = [{}]
    finals: set[int] = set()
    for choice in choices:
        state = 0
        for byte in choice:
            if byte not in edges[state]:
                edges[state][byte] = len(edges)
                edges.append({})
            state = edges[state][byte]
            if len(edges) > MAX_STATES:
                return None
        finals.add(state)
    return ByteTable(edges, finals)


def regex_table(pattern: str, character_class: CharacterClass) -> ByteTable | None:
    """A table of what a regular expression matches from end to end; None where there is none to be had."""
    automaton = _Automaton()
    try:
        first = automaton.state()
        last = automaton.build(_Reader(pattern, character_class).read(), first)
        edges, finals = _determined(automaton, first, last)
    except (TooLarge, NotRead):
        return None
    return _trimmed(edges, finals)


# ── an expression ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Characters:
    sequences: Sequences


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Either:
    branches: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeated:
    """least to most times; None for any number."""

    part: _Node
    least: int
    most: int | None


_Node = _Characters | _Sequence | _Either | _Repeated


class _Reader:
    """Reads an expression; raises NotRead for what has another meaning elsewhere, or none here."""

    def __init__(self, pattern: str, character_class: CharacterClass) -> None:
        flags = _FLAGS.match(pattern)
        self._flags = flags.group()[2:-1] if flags else ""
        self._text, self._at = pattern, flags.end() if flags else 0
        self._ask = character_class
        self._depth = 0

    def read(self) -> _Node:
        node = self._either()
        if self._at < len(self._text):
            raise NotRead
        return node

    def _either(self) -> _Node:
        branches = [self._sequence()]
        while self._next() == "|":
            self._at += 1
            branches.append(self._sequence())
        return _Either(tuple(branches))

    def _sequence(self) -> _Node:
        parts = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._part()))
        return _Sequence(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        sign = self._next()
        if sign == "" or sign not in "*+?{":
            return part
        found = _REPEAT.match(self._text, self._at)
        if found is None:
            raise NotRead
        self._at = found.end()
        if sign == "{":
            least = int(found["least"])
            most = least if found["comma"] is None else int(found["most"]) if found["most"] else None
        else:
            least, most = int(sign == "+"), 1 if sign == "?" else None
        if self._next() == "?":  # lazy, which is the same language
            self._at += 1
        following = self._next()
        if (following != "" and following in "*+?{") or (most is not None and most < least):
            raise NotRead
        return _Repeated(part, least, most)

    def _part(self) -> _Node:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return _Characters(self._set())
        if character == "\\":
            return _Characters(self._escape())
        if character in "*+?{}^$]":
            raise NotRead
        self._at += 1
        if character == ".":
            return _Characters(utf8_sequences(complement([] if "s" in self._flags else [(10, 10)])))
        return _Characters(self._character(character))

    def _group(self) -> _Node:
        found = _GROUP.match(self._text, self._at)
        assert found is not None
        self._at, self._depth = found.end(), self._depth + 1
        if self._depth > MAX_DEPTH or self._next() == "?":
            raise NotRead
        node = self._either()
        if self._next() != ")":
            raise NotRead
        self._at, self._depth = self._at + 1, self._depth - 1
        return node

    def _escape(self) -> Sequences:
        begin = self._at
        character = self._text[begin + 1 : begin + 2]
        found = _NAMED_CLASS.match(self._text, begin)
        if found is not None:
            self._at = found.end()
            source = found.group()
            if source[1].islower():
                return self._asked(source)
            return self._all_but(source[0] + source[1].lower() + source[2:])
        self._at += 2
        return self._character(_unescaped(character))

    def _set(self) -> Sequences:
        begin = self._at
        ranges = None if "i" in self._flags else self._plain_set()
        if ranges is not None:
            return utf8_sequences(ranges)
        self._at = _end_of_set(self._text, begin)
        source = self._text[begin : self._at]
        return self._all_but("[" + source[2:]) if source.startswith("[^") else self._asked(source)

    def _plain_set(self) -> list[tuple[int, int]] | None:
        """The code points of a set that names characters and ranges alone; None for others."""
        found = _PLAIN_SET.match(self._text, self._at)
        if found is None:
            return None
        ranges = []
        for item in _RANGE.finditer(found["items"]):
            low, high = (
                end if len(end) < 2 else _unescaped(end[1]) for end in (item["low"], item["high"] or item["low"])
            )
            if high < low:
                raise NotRead
            ranges.append((ord(low), ord(high)))
        self._at = found.end()
        return complement(ranges) if found["negated"] else ranges

    def _character(self, character: str) -> Sequences:
        if "i" in self._flags:
            return self._asked(re.escape(character))
        return (tuple((byte, byte) for byte in character.encode()),)

    def _all_but(self, source: str) -> Sequences:
        """The characters that are not of a class, which are many to ask for."""
        if "i" in self._flags:
            raise NotRead
        return utf8_sequences(complement(code_points(self._asked(source))))

    def _asked(self, source: str) -> Sequences:
        try:
            return self._ask(f"(?{self._flags}){source}" if self._flags else source)
        except ValueError:
            raise NotRead from None

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]


def _unescaped(character: str) -> str:
    """What a backslash makes of a character that has no class to name."""
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character == "" or character not in _PUNCTUATION:
        raise NotRead
    return character


def _end_of_set(text: str, begin: int) -> int:
    """Behind the bracket that closes the one at `begin`; sets may hold sets."""
    depth, at = 0, begin
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "[":
            depth += 1
            at += text.startswith("^", at + 1)
            at += text.startswith("]", at + 1)  # the first in a set is a character
        elif text[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise NotRead


# ── characters as bytes ───────────────────────────────────────────────────────────────────────────


def complement(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The code points in none of the ranges."""
    left, begin = [], 0
    for low, high in sorted(ranges):
        if low > begin:
            left.append((begin, low - 1))
        begin = max(begin, high + 1)
    return [*left, (begin, _LAST)] if begin <= _LAST else left


def code_points(sequences: Sequences) -> list[tuple[int, int]]:
    """The characters that sequences stand for, as ranges."""
    found = []
    for *heads, (low, high) in sequences:
        for head in product(*(range(first, last + 1) for first, last in heads)):
            first, last = (ord(bytes((*head, byte)).decode()) for byte in (low, high))
            found.append((first, last))
    return found


def utf8_sequences(ranges: Iterable[tuple[int, int]]) -> Sequences:
    """The UTF-8 of code points; surrogates have none."""
    return tuple(
        sequence
        for low, high in ranges
        for first, last in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high))
        if first <= last
        for sequence in _utf8(first, last)
    )


def _utf8(first: int, last: int) -> Iterator[Ranges]:
    """Sequences whose every product is well-formed and within the range."""
    for most in (0x7F, 0x7FF, 0xFFFF):
        if first <= most < last:
            yield from _utf8(first, most)
            yield from _utf8(most + 1, last)
            return
    if last > 0x7F:
        for bits in (6, 12, 18):  # all of what the last bytes may be, or all the same bytes before them
            mask = (1 << bits) - 1
            if first & ~mask != last & ~mask:
                if first & mask:
                    yield from _utf8(first, first | mask)
                    yield from _utf8((first | mask) + 1, last)
                    return
                if last & mask != mask:
                    yield from _utf8(first, (last & ~mask) - 1)
                    yield from _utf8(last & ~mask, last)
                    return
    yield tuple(zip(chr(first).encode(), chr(last).encode(), strict=True))


# ── from an expression to a table ─────────────────────────────────────────────────────────────────


class _Automaton:
    """edges: by state, byte ranges and where each leads; free: by state, where it leads without a byte."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int, int]]] = []
        self.free: list[list[int]] = []

    def build(self, node: _Node, first: int) -> int:
        """The state in which a way over the node ends that begins in `first`."""
        match node:
            case _Characters(sequences):
                last = self.state()
                tails: dict[Ranges, int] = {(): last}
                for sequence in sequences:
                    self._add(first, sequence, tails)
            case _Sequence(parts):
                last = first
                for part in parts:
                    last = self.build(part, last)
            case _Either(branches):
                last = self.state()
                for branch in branches:
                    self.free[self.build(branch, self._behind(first))].append(last)
            case _Repeated(part, least, most):
                last = first
                for _ in range(least):
                    last = self.build(part, last)
                if most is None:
                    last = self._behind(last)
                    self.free[self.build(part, self._behind(last))].append(last)
                else:
                    ends = [last]
                    for _ in range(most - least):
                        ends = [*ends, self.build(part, ends[-1])]
                    last = self.state()
                    for end in ends:
                        self.free[end].append(last)
        return last

    def state(self) -> int:
        if len(self.edges) == MAX_PLACES:
            raise TooLarge
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def _behind(self, state: int) -> int:
        """A new state, reached without a byte."""
        new = self.state()
        self.free[state].append(new)
        return new

    def _add(self, state: int, sequence: Ranges, tails: dict[Ranges, int]) -> None:
        """A way from a state over a sequence; tails: where the rests of sequences begin that lead to the same end."""
        (low, high), rest = sequence[0], sequence[1:]
        if rest not in tails:
            tails[rest] = self.state()
            self._add(tails[rest], rest, tails)
        self.edges[state].append((low, high, tails[rest]))


def _determined(automaton: _Automaton, first: int, last: int) -> tuple[list[dict[int, int]], set[int]]:
    """Edges and finals of an automaton that has no choice: its states are sets of the other's."""
    work = 0

    def closed(states: Iterable[int]) -> frozenset[int]:
        nonlocal work
        found = set(states)
        todo = list(found)
        while todo:
            for following in automaton.free[todo.pop()]:
                work += 1
                if following not in found:
                    found.add(following)
                    todo.append(following)
        return frozenset(found)

    start = closed([first])
    numbers, queue = {start: 0}, [start]
    edges: list[dict[int, int]] = []
    targets: dict[frozenset[int], frozenset[int]] = {}
    for states in queue:
        by_byte: dict[int, set[int]] = {}
        for state in states:
            for low, high, following in automaton.edges[state]:
                work += high - low + 1
                for byte in range(low, high + 1):
                    by_byte.setdefault(byte, set()).add(following)
        if work > MAX_WORK:
            raise TooLarge
        followers = {}
        for byte, reached in by_byte.items():
            key = frozenset(reached)
            target = targets.get(key)
            if target is None:
                target = targets[key] = closed(key)
            if target not in numbers:
                if len(numbers) == MAX_STATES:
                    raise TooLarge
                numbers[target] = len(numbers)
                queue.append(target)
            followers[byte] = numbers[target]
        edges.append(followers)
    return edges, {number for states, number in numbers.items() if last in states}


def _trimmed(edges: list[dict[int, int]], finals: set[int]) -> ByteTable | None:
    """Without the states from which no end can be reached; None where there are no others."""
    before: list[set[int]] = [set() for _ in edges]
    for state, followers in enumerate(edges):
        for following in followers.values():
            before[following].add(state)
    alive, queue = set(finals), list(finals)
    for state in queue:
        for previous in before[state] - alive:
            alive.add(previous)
            queue.append(previous)
    if 0 not in alive:
        return None
    numbers: Mapping[int, int] = {state: number for number, state in enumerate(sorted(alive))}
    kept = [
        {byte: numbers[following] for byte, following in edges[state].items() if following in alive}
        for state in numbers
    ]
    return ByteTable(kept, [numbers[state] for state in finals])
