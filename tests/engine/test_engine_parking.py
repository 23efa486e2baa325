"""Parking, prefill beside streams, and conservation, on the engine itself; what rows write meanwhile is the business of
`test_batching_exactness`."""

from __future__ import annotations

import logging
from typing import Any

import pytest

PARAMS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, "utf8": "raw"}
TEXTS = [b"\xfe" + bytes([letter]) * 3 for letter in b"abcdef"]


@pytest.mark.parametrize("batching", ["aligned", "adaptive"])
@pytest.mark.parametrize("most", [2, 5])
def test_no_row_waits_longer_than_it_may(driver_of, batching, most):
    driver = driver_of("b_2stage", batching=batching, max_park_ticks=most)
    scheduler = driver.engine._scheduler
    for index, text in enumerate(TEXTS):
        driver.submit(str(index), text, **PARAMS)
    waits = 0
    while driver.engine.has_work:
        driver.tick()
        waiting = [request for request in scheduler.live() if request.due]
        assert sum(driver.ticks[-1].stats.parked) == len(waiting)
        assert all(scheduler._tick - request.parked_tick <= most for request in waiting)
        waits += len(driver.ticks[-1].stats.park_waits)
    assert waits > 0 or batching == "adaptive"
    told = sum(seconds for tick in driver.ticks for _, seconds in tick.stats.park_waits)
    assert told == pytest.approx(sum(each.last.usage.park_seconds for each in driver.gathered.values()))


@pytest.mark.parametrize("batching", ["aligned", "adaptive"])
def test_a_lone_stream_never_waits(driver_of, batching):
    driver = driver_of("b_2stage", batching=batching)
    gathered = driver.alone(TEXTS[0], **PARAMS)
    assert gathered.last.usage.park_seconds == 0
    assert all(not tick.stats.park_waits for tick in driver.ticks)
    assert all(len(tick.outputs) == 1 for tick in driver.ticks)  # a byte every tick


def test_rows_that_wait_together_run_a_stage_once_for_all(driver_of):
    """Aligned: the main network runs less often, for more rows; its rows together are the same."""
    runs, rows = {}, {}
    for batching in ("lockstep", "aligned"):
        driver = driver_of("b_2stage", batching=batching)
        for index, text in enumerate(TEXTS):
            driver.submit(str(index), text, **PARAMS)
        driver.run()
        records = [record for tick in driver.ticks for record in tick.stats.steps]
        main = [record.rows for record in records if record.kind == "stage" and record.stage == 2]
        runs[batching], rows[batching] = len(main), sum(main)
    assert rows["aligned"] == rows["lockstep"] > 0
    assert runs["aligned"] < 0.8 * runs["lockstep"]


def test_a_parked_row_is_aborted_like_any_other(driver_of):
    driver = driver_of("b_2stage", batching="aligned")
    for index, text in enumerate(TEXTS):
        driver.submit(str(index), text, **PARAMS)
    while not any(request.due for request in driver.engine._scheduler.live()):
        driver.tick()
    parked = next(request for request in driver.engine._scheduler.live() if request.due)
    driver.engine.abort(parked.request_id)
    driver.engine.check()
    driver.tick()
    assert driver.gathered[parked.request_id].finish_reason == "abort"
    driver.run()
    assert sum(each.finish_reason == "length" for each in driver.gathered.values()) == len(TEXTS) - 1


def test_a_short_prompt_does_not_wait_for_a_long_one(driver_of):
    """Each prompt gets its share of a tick's bytes, whichever came first."""
    driver = driver_of("a_1stage", prefill_bytes_per_tick=16, prefill_share=1.0)
    driver.submit("stream", TEXTS[0], **PARAMS)
    driver.tick()
    driver.submit("long", b"\xfe" + b"a long one " * 40, **{**PARAMS, "max_tokens": 1})
    driver.submit("short", b"\xfeshort", **{**PARAMS, "max_tokens": 1})
    driver.run()
    ended = {
        output.request_id: number
        for number, tick in enumerate(driver.ticks)
        for output in tick.outputs
        if output.finish_reason
    }
    assert ended["short"] == 1  # 8 of the 16 bytes of its first tick
    assert ended["long"] >= 440 // 16


def test_a_full_cache_hit_has_its_first_byte_without_a_run(driver_of):
    driver = driver_of("b_2stage")
    prompt = b"\xfe" + b"What two requests have in common. " * 3
    first = driver.alone(prompt, **{**PARAMS, "logprobs": 2, "return_chunks": True})
    before = len(driver.ticks)
    second = driver.alone(prompt, **{**PARAMS, "logprobs": 2, "return_chunks": True})
    assert second.substance == first.substance
    assert second.last.usage.cached_bytes == len(prompt)
    assert not any(record.kind == "prefill" for tick in driver.ticks[before:] for record in tick.stats.steps)
    stats = driver.ticks[-1].stats
    assert (stats.prefix_cache_queries_bytes_total, stats.prefix_cache_hits_bytes_total) == (
        2 * len(prompt),
        len(prompt),
    )
    assert stats.prefix_cache_bytes > 0
    assert stats.prompt_bytes_total == len(prompt)


def test_whatever_the_cache_holds_an_idle_engine_has_all_else_free(driver_of):
    driver = driver_of("b_2stage")
    driver.alone(b"\xfe" + b"What is kept. " * 8, **PARAMS)
    stats = driver.tick().stats
    assert (stats.kv_in_use, stats.rows_in_use, stats.running, stats.waiting) == (0.0, 0.0, 0, 0)


def test_an_idle_engine_says_so_when_a_page_is_lost(driver_of, caplog):
    driver = driver_of("b_2stage")
    driver.alone(TEXTS[0], **PARAMS)
    (pages,) = driver.engine._loop._runner.state.pages
    pages.pool._free.pop()
    with caplog.at_level(logging.ERROR, logger="hnet.engine"):
        driver.engine.tick()
        driver.engine.tick()
    assert len(caplog.records) == 1  # once
    assert "pages leaked" in caplog.text


def test_with_debug_checks_a_lost_page_is_an_error_in_the_tick_it_is_lost_in(driver_of):
    driver = driver_of("b_2stage", debug_checks=True)
    driver.submit("r", TEXTS[0], **PARAMS)
    driver.tick()
    (pages,) = driver.engine._loop._runner.state.pages
    pages.pool._free.pop()
    with pytest.raises(AssertionError, match="pages leaked"):
        driver.engine.tick()
