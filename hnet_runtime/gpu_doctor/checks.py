"""A check: a name, something that may fail, and what came of it. Knows nothing of what is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What a check found. demand: what was asked for; said: what was found, in a line; figures: by name, what JSON can
    hold."""

    group: str
    name: str
    passed: bool
    demand: str = ""
    said: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Outcome:
    """Of a check that came to its end."""

    passed: bool
    said: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """`run` may raise: an AssertionError is a difference found, anything else is a failure as well."""

    name: str
    run: Callable[[], Outcome]
    demand: str = ""


@dataclass(frozen=True)
class Settings:
    """What is asked of all groups. Device and MODEL by their names, `rows` the buckets that are timed, `most_rows` the
    largest of steps compared, in at most `max_graphs` graphs; `text_bytes` are read, and `completion_bytes` written by
    each row that is timed; kernels get the official models' sizes, or small ones. No group takes longer than
    `limit_seconds`."""

    device: str
    model: str | None = None
    config: str | None = None
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    most_rows: int = 128
    max_graphs: int = 128
    text_bytes: int = 10_000
    completion_bytes: int = 256
    official_sizes: bool = True
    limit_seconds: float = 900.0


Group = Callable[[Any, Settings], Iterator[Check]]
"""(Device, Settings) → its checks, always the same ones in the same order."""
