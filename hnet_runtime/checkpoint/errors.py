"""The one error of this package. Knows no torch, so that catching it costs nothing."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A model that cannot be found or loaded; the message is one line naming the file and the key."""


def and_more(items: Sequence[object]) -> str:
    """`" (and 3 more)"` for the items after the first, or nothing."""
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
