"""Bytes and verdicts → text that shows its chunks, while both still arrive.

Knows UTF-8, terminals' colours and the chunk offsets of the engine. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hnet_runtime.config import BOS
from hnet_runtime.engine.messages import Chunk
from server.text import TextDecoder

MARK = "|"
_RESET = "\x1b[0m"
# For each stage, outermost first, two colours that take turns, so that neighbouring chunks can be told apart.
_COLOURS = (("36", "94"), ("33", "93"), ("35", "95"), ("32", "92"))


class ChunkPainter:
    """Shows where chunks open: in colour by the deepest stage that opened one, or by one `|` a stage.

    Offsets count from the prompt's first byte, as the engine's do; a BOS there is not shown. `start` is the offset
    of the first byte that will be added. A boundary inside a character is shown before the character. `clean` is
    applied to the text itself, not to what is put between.
    """

    def __init__(self, *, colour: bool, start: int = 0, clean: Callable[[str], str] = str) -> None:
        self._colour, self._clean = colour, clean
        self._decoder = TextDecoder()
        self._waiting = bytearray()
        self._offset = start  # of the first waiting byte
        self._depths: dict[int, int] = {}
        self._depth = 0  # of the deepest chunk opened since the last character
        self._turns = [0] * len(_COLOURS)
        self._begun = False

    def add(self, data: bytes) -> None:
        """Bytes that follow those before."""
        self._waiting += data

    def opened(self, chunks: Iterable[Chunk]) -> None:
        """Chunks that open at bytes not yet taken."""
        for chunk in chunks:
            self._depths[chunk.start] = max(self._depths.get(chunk.start, 0), chunk.stage)

    def take(self, *, hold: int = 0) -> str:
        """The text of all bytes but the last `hold`, whose verdicts may still come."""
        count = max(len(self._waiting) - hold, 0)
        ready = bytes(self._waiting[:count])
        del self._waiting[:count]
        return "".join(self._paint(bytes([byte])) for byte in ready)

    def finish(self) -> str:
        """What is left, a cut character as U+FFFD, and the terminal as it was."""
        text = self.take()
        rest = self._decoder.finish(drop_incomplete=False)
        if rest:
            text += self._mark() + self._clean(rest)
        return text + (_RESET if self._colour and self._begun else "")

    def _paint(self, byte: bytes) -> str:
        offset, self._offset = self._offset, self._offset + 1
        if offset == 0 and byte[0] == BOS:
            return ""
        self._depth = max(self._depth, self._depths.pop(offset, 0))
        text = self._decoder.feed(byte)
        return self._mark() + self._clean(text) if text else ""

    def _mark(self) -> str:
        depth, self._depth = self._depth, 0
        first, self._begun = not self._begun, True
        if not self._colour:
            return MARK * depth if depth and not first else ""
        if not depth:
            return ""
        stage = min(depth, len(_COLOURS)) - 1
        self._turns[stage] ^= 1
        return f"{_RESET}\x1b[{_COLOURS[stage][self._turns[stage]]}m"
