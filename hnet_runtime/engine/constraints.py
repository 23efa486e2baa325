"""What a completion has to be: a constraint compiled, and a cursor that follows one completion through it.

A choice, and a regular expression of few enough states, become a table of states × bytes (`byte_tables`). JSON schemas,
grammars and larger expressions are followed by llguidance's parser over a vocabulary of the 256 bytes and an end, so
that no token ever straddles a border. Knows no requests, no rows and no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import count
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from numpy.typing import NDArray

from hnet_runtime.config import EOS, VOCAB_SIZE
from hnet_runtime.engine import utf8
from hnet_runtime.engine.byte_tables import ByteTable, Sequences, choice_table, regex_table
from hnet_runtime.engine.json_schemas import enforceable
from hnet_runtime.engine.messages import MAX_CONSTRAINT_BYTES, Constraint

MAX_MASKS = 4096  # looked at to learn what a class of characters holds
_END = VOCAB_SIZE  # the number that stands for the end where bytes are tokens

Mask = NDArray[np.bool_]


class ConstraintError(ValueError):
    """A constraint that cannot be enforced; one line that names what is wrong in it."""


class Cursor(Protocol):
    """A place in a constraint.

    mask: [V] the bytes that may come, and at `EOS` whether the completion may end here (byte 255 itself is no text, so
    no constraint asks for it). forced: the bytes that have to come, where each is the only one that may.
    """

    @property
    def mask(self) -> Mask: ...

    @property
    def forced(self) -> bytes: ...

    def advance(self, data: bytes) -> None:
        """Goes on over bytes, each of which the mask allowed. Raises ConstraintError where that takes too much work."""

    def permits(self, data: bytes) -> bool:
        """Whether these bytes may come next, one after the other."""


class Compiled(Protocol):
    @property
    def is_table(self) -> bool: ...

    def begin(self) -> Cursor: ...


# ── tables ────────────────────────────────────────────────────────────────────────────────────────


class Table:
    """A constraint that a table says."""

    is_table = True

    def __init__(self, table: ByteTable) -> None:
        self._table = table

    def begin(self) -> TableCursor:
        return TableCursor(self._table)


class TableCursor:
    """A state of a table."""

    def __init__(self, table: ByteTable) -> None:
        self._table, self.state = table, 0

    @property
    def mask(self) -> Mask:
        mask: Mask = self._table.allowed[self.state]
        return mask

    @property
    def forced(self) -> bytes:
        return self._table.forced(self.state)

    def advance(self, data: bytes) -> None:
        for byte in data:
            self.state = int(self._table.following[self.state, byte])

    def permits(self, data: bytes) -> bool:
        state = self.state
        for byte in data:
            state = int(self._table.following[state, byte])
            if state < 0:
                return False
        return True


# ── grammars ──────────────────────────────────────────────────────────────────────────────────────


class Grammar:
    """A constraint that llguidance follows."""

    is_table = False

    def __init__(self, grammar: str) -> None:
        self._matcher = _matcher(grammar)
        self.begin()  # where nothing can come at all, that is found here

    def begin(self) -> GrammarCursor:
        return GrammarCursor(self._matcher.deep_copy())


class GrammarCursor:
    """A state of llguidance's parser. The mask is made anew by `advance`, where the work is."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._look()

    @property
    def mask(self) -> Mask:
        return self._mask

    @property
    def forced(self) -> bytes:
        return self._forced

    def advance(self, data: bytes) -> None:
        self._matcher.consume_tokens(list(data))
        self._look()

    def permits(self, data: bytes) -> bool:
        return bool(self._matcher.validate_tokens(list(data)) == len(data))

    def _look(self) -> None:
        biases = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)
        _raise_error(self._matcher)
        self._mask: Mask = biases[:VOCAB_SIZE] != 0
        self._mask[EOS] = biases[_END]
        is_alone = np.count_nonzero(self._mask) == 1 and not self._mask[EOS]
        self._forced = self._matcher.compute_ff_bytes() if is_alone else b""
        if not self._mask.any():
            raise ConstraintError("comes to a place where nothing may follow")


def _matcher(grammar: str) -> LLMatcher:
    matcher = LLMatcher(_tokenizer(), grammar, log_level=0, limits=_limits())
    _raise_error(matcher)
    return matcher


def _raise_error(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise ConstraintError(_one_line(matcher.get_error()))


@cache
def _tokenizer() -> LLTokenizer:
    class Bytes:
        eos_token_id, bos_token_id = _END, None
        tokens = (*(bytes((byte,)) for byte in range(VOCAB_SIZE)), b"<end>")
        special_token_ids = (_END,)

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=VOCAB_SIZE + 1, slices=[])


def _limits() -> LLParserLimits:
    """What one constraint may take: some 20 ms to compile, a few for each byte, tens of MB in all."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=2_000,
        max_items_in_row=1_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


@lru_cache(maxsize=64)
def character_class(source: str) -> Sequences:
    """The byte sequences of the characters that a class of llguidance's dialect stands for.

    Raises ValueError for what is none, something longer or shorter than a character, and for too large ones.
    """
    return _sequences(_matcher(LLMatcher.grammar_from_regex(source)), 0, 0, count())


def _sequences(matcher: LLMatcher, length: int, wanted: int, masks: Iterator[int]) -> Sequences:
    """What may still come of a character that has `length` bytes of `wanted`; 0 where none has come."""
    if next(masks) == MAX_MASKS:
        raise ConstraintError("has too many characters")
    mask = matcher.compute_logit_bias()
    if length and length == wanted:
        if not mask[_END] or any(mask[:_END]):
            raise ConstraintError("is longer than a character")
        return ((),)
    if mask[_END]:
        raise ConstraintError("is shorter than a character")
    found: list[tuple[int, int, Sequences]] = []  # neighbours that are followed by the same
    for byte in range(VOCAB_SIZE):
        if not mask[byte]:
            continue
        if length + 1 == wanted and found:  # as after the first: this is the last byte of them all
            following = found[-1][2]
        else:
            matcher.consume_token(byte)
            following = _sequences(matcher, length + 1, wanted or utf8.length_of(byte), masks)
            matcher.rollback(1)
        if found and found[-1][1] == byte - 1 and found[-1][2] == following:
            found[-1] = found[-1][0], byte, following
        else:
            found.append((byte, byte, following))
    return tuple(((low, high), *rest) for low, high, following in found for rest in following)


# ── from a constraint to what follows it ──────────────────────────────────────────────────────────


@lru_cache(maxsize=64)
def compiled(constraint: Constraint) -> Compiled:
    """As `compile_constraint`; the last ones are kept. May be called by any thread."""
    return compile_constraint(constraint)


def compile_constraint(constraint: Constraint) -> Compiled:
    """Raises ConstraintError for what cannot be enforced. The work is bounded."""
    source = constraint.source
    if len(source.encode("utf-8", "surrogatepass")) > MAX_CONSTRAINT_BYTES:
        raise ConstraintError(f"has more than {MAX_CONSTRAINT_BYTES} bytes")
    match constraint.kind:
        case "choice":
            table = choice_table(choice.encode() for choice in json.loads(source))
            return Table(table) if table else _grammar(grammar_from, "choice", source)
        case "regex":
            source = _without_anchors(source)
            grammar = _grammar(LLMatcher.grammar_from_regex, source)  # which knows what is wrong with one
            table = regex_table(source, character_class)
            return Table(table) if table else grammar
        case "json":
            options: dict[str, Any] = {}
            if constraint.whitespace:
                options["whitespace_pattern"] = constraint.whitespace
            elif constraint.whitespace == "":
                options["whitespace_flexible"] = False
            schema = _schema(source, constraint.closed)
            return _grammar(LLMatcher.grammar_from_json_schema, schema, options)
        case "grammar":
            return _grammar(grammar_from, "grammar", source)


def _schema(source: str, closed: bool) -> str:
    try:
        return json.dumps(enforceable(json.loads(source), closed=closed))
    except (ValueError, RecursionError) as error:  # SchemaError too
        reason = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConstraintError(_one_line(reason)) from None


def _grammar(read: Callable[..., str], *arguments: Any) -> Grammar:
    try:
        return Grammar(read(*arguments))
    except ConstraintError:
        raise
    except ValueError as error:
        raise ConstraintError(_one_line(str(error))) from None


def _without_anchors(pattern: str) -> str:
    """A match goes from end to end anyway."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$"):
        backslashes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\"))
        if backslashes % 2 == 0:
            return pattern[:-1]
    return pattern


def _one_line(text: str) -> str:
    """Without the source that llguidance shows below what is wrong with it."""
    return " ".join(text.partition("\n   1 |")[0].split())[:300]
