"""Bytes into text while they arrive, one whole character at a time.

Knows UTF-8 and nothing of requests, events or models. What comes out over any split of the
bytes is what `bytes.decode("utf-8", "replace")` gives for the whole: a well-formed character once
its last byte is there, U+FFFD for each maximal ill-formed part as soon as it is known to be one.
"""

from __future__ import annotations

import codecs

_incremental = codecs.getincrementaldecoder("utf-8")

BYTE_KEYS: tuple[str, ...] = tuple(
    "\\\\" if byte == 0x5C else chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02x}" for byte in range(256)
)
"""A name for each of the 256 bytes: printable ASCII as itself, `\\\\` for the backslash, else `\\xNN`."""

TOKEN_ID_KEYS: tuple[str, ...] = tuple(f"token_id:{byte}" for byte in range(256))
"""The same as vLLM names tokens under `return_tokens_as_token_ids`."""


class TextDecoder:
    """Decodes one stream of bytes; never waits on a byte that cannot become a character."""

    def __init__(self) -> None:
        self._decoder = _incremental("replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes."""
        text = self._decoder.decode(data)
        pending = self.pending
        if len(pending) == 2 and pending[0] == 0xED and pending[1] >= 0xA0:
            # Half a surrogate: no character begins so, but Python's decoder waits for the third byte.
            text += self._decoder.decode(b"", final=True)
        return text

    @property
    def pending(self) -> bytes:
        """The 0–3 bytes held back: the beginning of a character that may still become one."""
        return self._decoder.getstate()[0]

    def finish(self, *, drop_incomplete: bool) -> str:
        """Ends the stream: the held bytes are dropped, or become one U+FFFD."""
        if drop_incomplete:
            self._decoder.reset()
            return ""
        return self._decoder.decode(b"", final=True)


def incomplete_tail(data: bytes) -> bytes:
    """The 0–3 last bytes of `data` that begin a character and do not end it."""
    decoder = TextDecoder()
    decoder.feed(data[-4:])
    return decoder.pending


def character_indices(data: bytes) -> list[int]:
    """For each byte, the index of its character in `data.decode("utf-8", "replace")`."""
    if data.isascii():
        return list(range(len(data)))
    decoder = TextDecoder()
    indices = []
    characters = 0
    for position in range(len(data)):
        characters += len(decoder.feed(data[position : position + 1]))
        # A held byte belongs to the character still to come, any other to the last one that came.
        indices.append(characters if decoder.pending else characters - 1)
    return indices
