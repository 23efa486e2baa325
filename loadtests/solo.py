"""Streams of a run beside the same requests alone: every byte that came under load has to be the same."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.client import ask
from loadtests.scenario import Scenario
from loadtests.stream import Record


@dataclass(frozen=True)
class Compared:
    """requests: asked for alone; streams: of the run that were those; garbled: with other bytes, or fewer than they
    should have; failed: requests that did not come whole alone, which nothing was compared with."""

    requests: int
    streams: int
    garbled: int
    failed: int

    def in_words(self) -> str:
        failed = f" ({self.failed} requests did not come whole alone)" if self.failed else ""
        return (
            f"{self.streams} streams compared with {self.requests} requests sent alone: {self.garbled} differ{failed}."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(url: str, scenario: Scenario, records: Iterable[Record], most: int) -> Compared:
    """Asks an idle server for at most so many of the requests of which something came, one after the other."""
    by_variant: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record.text:
            by_variant[record.variant].append(record)
    chosen = sorted(by_variant, key=lambda variant: (-len(by_variant[variant]), variant))[:most]
    streams = garbled = failed = 0
    for variant in chosen:
        alone = Record("", variant, time.monotonic())
        ask(url, scenario.request(variant), alone, salt=f"alone {variant}", abort_after=None)
        if alone.outcome != "complete":
            failed += 1
            continue
        streams += len(by_variant[variant])
        garbled += sum(not is_same(record, alone) for record in by_variant[variant])
    return Compared(len(chosen) - failed, streams, garbled, failed)


def is_same(record: Record, alone: Record) -> bool:
    """The whole text of a stream that came whole, the beginning of it where it did not."""
    if record.outcome == "complete":
        return (record.text, record.reason) == (alone.text, alone.reason)
    return alone.text.startswith(record.text)
