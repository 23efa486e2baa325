"""What a completion has to be: a constraint compiled, and a cursor that follows one completion through it.

A choice, and a regular expression of few enough states, become a table of states × bytes that a sampler can keep beside
it. JSON schemas, grammars and larger expressions are followed by llguidance's parser over a vocabulary of the 256 bytes
and an end, so that no token ever straddles a border. Knows no requests, no rows and no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from numpy.typing import NDArray
from outlines_core import Index, Vocabulary

from hnet_runtime.config import EOS, VOCAB_SIZE
from hnet_runtime.engine.messages import Constraint

MAX_SOURCE_BYTES = 1 << 16
MAX_STATES = 1024  # of a table
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


class ByteTable:
    """An automaton of S states, state 0 first; from every state some end can be reached.

    allowed: [S, V] the masks of a cursor; following: [S, V] int16, the next state, −1 where there is none.
    """

    is_table = True

    def __init__(self, edges: list[dict[int, int]], finals: Iterable[int]) -> None:
        self.following = np.full((len(edges), VOCAB_SIZE), -1, dtype=np.int16)
        for state, followers in enumerate(edges):
            self.following[state, list(followers)] = list(followers.values())
        self.allowed = self.following >= 0
        self.allowed[:, EOS] = False
        self.allowed[sorted(finals), EOS] = True
        self._forced: dict[int, bytes] = {}

    @property
    def num_states(self) -> int:
        return len(self.allowed)

    def begin(self) -> TableCursor:
        return TableCursor(self)

    def forced(self, state: int) -> bytes:
        """What has to come after a state."""
        found = self._forced.get(state)
        if found is None:
            data, at, seen = bytearray(), state, {state}
            while self.allowed[at].sum() == 1 and not self.allowed[at, EOS]:
                byte = int(self.allowed[at].argmax())
                data.append(byte)
                at = int(self.following[at, byte])
                if at in seen:  # a circle with one way through it has no end, and so is in no table
                    raise AssertionError("a table with a state that never ends")
                seen.add(at)
            found = self._forced[state] = bytes(data)
        return found


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


def regex_table(pattern: str) -> ByteTable | None:
    """A table of what a regular expression matches from end to end; None where it would have more than MAX_STATES
    states, or is none at all."""
    try:
        index = Index(pattern, _vocabulary())
    except ValueError:
        return None
    numbers = {index.get_initial_state(): 0}
    edges: list[dict[int, int]] = []
    for state in (queue := [index.get_initial_state()]):
        followers: dict[int, int] = {}
        for byte in index.get_allowed_tokens(state) or ():
            if byte == _END:
                continue
            following = index.get_next_state(state, byte)
            if following not in numbers:
                if len(numbers) == MAX_STATES:
                    return None
                numbers[following] = len(numbers)
                queue.append(following)
            followers[byte] = numbers[following]
        edges.append(followers)
    finals = {number for state, number in numbers.items() if index.is_final_state(state)}
    return _trimmed(edges, finals)


def _trimmed(edges: list[dict[int, int]], finals: set[int]) -> ByteTable | None:
    """Without the states from which no end can be reached; None where there are no others."""
    before: list[list[int]] = [[] for _ in edges]
    for state, followers in enumerate(edges):
        for following in set(followers.values()):
            before[following].append(state)
    alive = set(finals)
    for state in (queue := list(finals)):
        for previous in before[state]:
            if previous not in alive:
                alive.add(previous)
                queue.append(previous)
    if 0 not in alive:
        return None
    numbers = {state: number for number, state in enumerate(sorted(alive))}
    kept = [
        {byte: numbers[following] for byte, following in edges[state].items() if following in alive}
        for state in numbers
    ]
    return ByteTable(kept, [numbers[state] for state in finals])


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary(_END, {bytes((byte,)): [byte] for byte in range(VOCAB_SIZE)})


# ── grammars ──────────────────────────────────────────────────────────────────────────────────────


class Grammar:
    """A constraint that llguidance follows."""

    is_table = False

    def __init__(self, grammar: str) -> None:
        self._matcher = LLMatcher(_tokenizer(), grammar, log_level=0, limits=_limits())
        _raise_error(self._matcher)
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
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


# ── from a constraint to what follows it ──────────────────────────────────────────────────────────


@lru_cache(maxsize=64)
def compiled(constraint: Constraint) -> Compiled:
    """As `compile_constraint`; the last ones are kept. May be called by any thread."""
    return compile_constraint(constraint)


def compile_constraint(constraint: Constraint) -> Compiled:
    """Raises ConstraintError for what cannot be enforced.

    A regular expression can take any time and memory to compile: who does not trust it tries it in a process apart.
    """
    source = constraint.source
    if len(source.encode("utf-8", "surrogatepass")) > MAX_SOURCE_BYTES:
        raise ConstraintError(f"has more than {MAX_SOURCE_BYTES} bytes")
    match constraint.kind:
        case "choice":
            return choice_table(choice.encode() for choice in json.loads(source)) or _grammar(
                grammar_from, "choice", source
            )
        case "regex":
            source = _without_anchors(source)
            table = regex_table(source) if constraint.tabulate else None
            # Which also says in words what is wrong with an expression.
            return table or _grammar(LLMatcher.grammar_from_regex, source)
        case "json":
            options: dict[str, Any] = {}
            if constraint.whitespace:
                options["whitespace_pattern"] = constraint.whitespace
            elif constraint.whitespace == "":
                options["whitespace_flexible"] = False
            return _grammar(LLMatcher.grammar_from_json_schema, source, options)
        case "grammar":
            return _grammar(grammar_from, "grammar", source)


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
