"""What HTTP costs: how the figures come about, without a server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.http_overhead import Clock, Served, _counted, prompts, rows_of


def served(rate: float, **cpu: float) -> Served:
    return Served(generated=1000, seconds=1000 / rate, events=500, first=0.01, cpu=cpu, queued=0.0)


def stream(*texts: str, told: int) -> bytes:
    documents = [
        *({"choices": [{"text": text}]} for text in texts),
        {"choices": [], "usage": {"completion_tokens": told}},
    ]
    return b"".join(b"data: %s\n\n" % json.dumps(document).encode() for document in documents) + b"data: [DONE]\n\n"


def test_ratios_are_of_the_same_round() -> None:
    alone = [served(rate, engine=0.1) for rate in (1000.0, 500.0, 250.0)]  # a machine that slows down
    http = [served(0.9 * one.rate, model=0.1, http=0.02) for one in alone]
    report, line = rows_of(16, alone, alone, http)
    rows = {row.name: row for row in report}
    assert len(rows) == len(report)
    assert rows["streams=16 http ÷ engine"].value == pytest.approx(0.9)
    assert rows["streams=16 CPU http"].value == pytest.approx(20)  # seconds of a million bytes
    assert rows["streams=16 events"].value == 2
    assert line[0] == "16"
    for row in report:
        if row.ratio_to is not None:
            assert row.ratio == pytest.approx(row.value / rows[row.ratio_to].value)


def test_a_stream_is_counted_by_its_text_which_its_usage_confirms() -> None:
    assert _counted(stream("añ", "b", told=4)) == (2, 4)
    with pytest.raises(RuntimeError, match="4 bytes of text, and its usage says 5"):
        _counted(stream("añ", "b", told=5))
    with pytest.raises(RuntimeError, match="not come to its end"):
        _counted(stream("añ", told=3).rpartition(b'data: {"choices": []')[0])


def test_no_two_prompts_begin_alike() -> None:
    asked = [prompt[:10] for turn in range(3) for prompt in prompts(64, turn)]
    assert len(set(asked)) == len(asked)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel keeps no such clock")
def test_a_clock_counts_this_processs_time() -> None:
    before = Clock.of(os.getpid())
    sum(range(3_000_000))
    used = Clock.of(os.getpid()) - before
    assert used.main > 0
    assert used.others >= 0
    assert used.queued >= 0
