from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loadtests.level import Level
from loadtests.scrape import Scrape
from loadtests.stream import Record


def _record(due: float = 0.0, text: str = "abcd", *, first: float = 0.1, gap: float = 0.1, **other: Any) -> Record:
    arrivals = [(due + first + gap * index, index + 1) for index in range(len(text))]
    known: dict[str, Any] = {
        "kind": "short",
        "variant": 1,
        "sent": due,
        "end": arrivals[-1][0] if arrivals else due,
        "outcome": "complete",
        "status": 200,
        "reason": "length",
        "prompt_tokens": 10,
        "completion_tokens": len(text),
        "text": text,
        "arrivals": arrivals,
    }
    return Record(due=due, **{**known, **other})


@pytest.fixture
def record() -> Callable[..., Record]:
    """A stream of a byte an event; any of a record's fields can be given."""
    return _record


def _scrape(length: int, generated: int, read: int, *, aborted: int = 0, rejected: int = 0, error: int = 0) -> Scrape:
    return Scrape.parse(
        f"""# TYPE hnet_request_finished_total counter
hnet_request_finished_total{{reason="length"}} {length}
hnet_request_finished_total{{reason="abort"}} {aborted}
hnet_request_finished_total{{reason="error"}} {error}
# TYPE hnet_admission_rejections_total counter
hnet_admission_rejections_total{{reason="slow_down"}} {rejected}
# TYPE hnet_request_generation_bytes summary
hnet_request_generation_bytes_sum {generated}
# TYPE hnet_request_prompt_bytes summary
hnet_request_prompt_bytes_sum {read}
"""
    )


@pytest.fixture
def counted() -> Callable[..., Scrape]:
    """What a server counted: requests that ended by length, bytes generated, bytes of prompts."""
    return _scrape


@pytest.fixture
def level() -> Callable[..., Level]:
    """Ten seconds from 0 on, of which the first two are not counted."""

    def make(*records: Record, rate: float = 1.0, counted: Scrape | None = None) -> Level:
        return Level(rate, 10.0, 2.0, 0.0, records, counted)

    return make
