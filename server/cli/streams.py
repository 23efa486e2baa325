"""Standard streams as bytes: UTF-8 whatever the locale says, and nothing held back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from click.exceptions import Exit

STANDARD_INPUT = "-"
PIPE_CLOSED = 141  # what a shell reports for SIGPIPE

# Control characters have pictures (␛ for ESC): a model must not be able to steer the terminal. Those of C1 have none.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def write(data: str | bytes) -> None:
    """Writes to standard output at once; ends the command quietly where nobody reads it any more."""
    try:
        sys.stdout.buffer.write(data.encode() if isinstance(data, str) else data)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        # What is still buffered goes nowhere, or the interpreter would complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Exit(PIPE_CLOSED) from error


def read_bytes(name: str) -> bytes:
    """All bytes of a file, or of standard input where `name` is `-`; raises OSError naming the file."""
    if name == STANDARD_INPUT:
        return sys.stdin.buffer.read()
    return Path(name).read_bytes()


def harmless(text: str) -> str:
    """`text` for a terminal: control characters but line feed and tab become pictures; elsewhere as it is."""
    return text.translate(_PICTURES) if sys.stdout.isatty() else text


def wants_colour() -> bool:
    """Whether colours are welcome: on a terminal, unless NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
