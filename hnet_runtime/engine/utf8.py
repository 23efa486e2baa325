"""Well-formed UTF-8 as an automaton over bytes, and the masks it allows. No tensors, no text.

The states follow table 3-7 of the Unicode standard: what may still come inside a character.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from hnet_runtime.config import EOS, VOCAB_SIZE
from hnet_runtime.engine.messages import Utf8Mode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

START = 0
_ONE, _TWO, _THREE, _E0, _ED, _F0, _F4 = range(1, 8)

# State → [(first byte, last byte, next state)]; a state's name says what it still needs.
_EDGES: dict[int, list[tuple[int, int, int]]] = {
    START: [
        (0x00, 0x7F, START),
        (0xC2, 0xDF, _ONE),
        (0xE0, 0xE0, _E0),
        (0xE1, 0xEC, _TWO),
        (0xED, 0xED, _ED),
        (0xEE, 0xEF, _TWO),
        (0xF0, 0xF0, _F0),
        (0xF1, 0xF3, _THREE),
        (0xF4, 0xF4, _F4),
    ],
    _ONE: [(0x80, 0xBF, START)],
    _TWO: [(0x80, 0xBF, _ONE)],
    _THREE: [(0x80, 0xBF, _TWO)],
    _E0: [(0xA0, 0xBF, _ONE)],  # no overlong forms
    _ED: [(0x80, 0x9F, _ONE)],  # no surrogates
    _F0: [(0x90, 0xBF, _TWO)],
    _F4: [(0x80, 0x8F, _TWO)],  # nothing beyond U+10FFFF
}
_NEEDED = {START: 0, _ONE: 1, _TWO: 2, _THREE: 3, _E0: 2, _ED: 2, _F0: 3, _F4: 3}
LONGEST = 4  # bytes of the longest character
STATES = tuple(_EDGES)
ANY_BYTE = len(_EDGES) * LONGEST * 2
"""Row of `mask_table` that allows every byte: `utf8: "raw"`."""


def advance(state: int, byte: int) -> int | None:
    """The state after `byte`, or None where it is not well-formed there."""
    for first, last, following in _EDGES[state]:
        if first <= byte <= last:
            return following
    return None


@cache
def followers(state: int) -> tuple[tuple[int, int], ...]:
    """Each byte that is well-formed in a state, with the state after it."""
    edges = _EDGES[state]
    return tuple((byte, following) for first, last, following in edges for byte in range(first, last + 1))


def length_of(lead: int) -> int:
    """Bytes of a character, by its first."""
    following = advance(START, lead)
    assert following is not None, "no character begins with this byte"
    return 1 + _NEEDED[following]


def state_after(data: bytes) -> int:
    """The state that `data` ends in: inside a character it has begun, or START; what is not well-formed is passed."""
    for length in range(1, min(LONGEST - 1, len(data)) + 1):
        state = START
        for byte in data[-length:]:
            following = advance(state, byte)
            if following is None or following == START:
                break
            state = following
        else:
            return state
    return START


def can_begin(prompt: bytes, mode: Utf8Mode) -> bool:
    """Whether a completion may begin with a character of its own behind a prompt, as one under a constraint has to."""
    return mode == "raw" or state_after(prompt) == START


def mask_row(state: int, remaining: int, may_end: bool) -> int:
    """The row of `mask_table` for a state, with `remaining` bytes (at least 1) that may still come."""
    return (state * LONGEST + min(remaining, LONGEST) - 1) * 2 + may_end


@cache
def state_table() -> NDArray[np.int64]:
    """[states + 1, V] the state after each byte, START where it is not well-formed; the last state, whose only mask is
    `ANY_BYTE`, stays. Rows of `mask_table` are 2 · LONGEST of each state in turn."""
    import numpy as np  # here alone, as below

    table = np.full((len(_EDGES) + 1, VOCAB_SIZE), START, dtype=np.int64)
    for state in STATES:
        for byte, following in followers(state):
            table[state, byte] = following
    table[-1] = len(_EDGES)
    return table


@cache
def mask_table() -> NDArray[np.bool_]:
    """[rows, V] True where the byte may come.

    A character is begun only if the bytes that remain can finish it; EOS (255, never part of well-formed text) is
    allowed between characters, where it may end the text.
    """
    import numpy as np  # here alone: who needs the automaton needs no arrays

    table = np.zeros((ANY_BYTE + 1, VOCAB_SIZE), dtype=np.bool_)
    for state, edges in _EDGES.items():
        for remaining in range(1, LONGEST + 1):
            for may_end in (False, True):
                row = table[mask_row(state, remaining, may_end)]
                for first, last, following in edges:
                    if state != START or _NEEDED[following] < remaining:
                        row[first : last + 1] = True
                row[EOS] = may_end and state == START
    table[ANY_BYTE] = True
    return table
