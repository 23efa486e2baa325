"""What a course counts of ticks made by hand: the bytes that count, gaps between chunks, and lengths of chunks."""

from __future__ import annotations

import pytest

from benchmarks.course import Course, TooShort
from hnet_runtime.engine.messages import Chunk, EngineStats, Output, StepRecord, Tick


def a_tick(*outputs: Output, staged: float = 0.0) -> Tick:
    return Tick(outputs=outputs, stats=EngineStats(steps=(StepRecord("byte", 0, 1, staged),)))


def one_byte(request_id: str, *chunks: Chunk, ends: bool = False) -> Output:
    return Output(request_id=request_id, data=b"x", chunks=chunks, finish_reason="length" if ends else None)


def test_counting_begins_a_tenth_after_all_rows_have_begun_and_ends_with_the_first_row():
    course = Course({"a": 3, "b": 3}, stages=2)
    course.take(a_tick(one_byte("a")), 100.0)  # b still reads its prompt
    course.take(a_tick(one_byte("a"), one_byte("b")), 50.0)
    for _ in range(9):
        course.take(a_tick(one_byte("a"), one_byte("b"), staged=1.5), 2.0)
    course.take(a_tick(one_byte("a"), staged=0.5), 3.0)  # b waits
    course.take(a_tick(one_byte("a", ends=True), staged=0.5), 3.0)
    assert course.is_over
    counted = course.counted()
    # Of 20 bytes after the second tick, two are the first tenth.
    assert (counted.num_bytes, counted.ticks) == (18, 10)
    assert counted.seconds == pytest.approx(8 * 2 + 6)
    assert counted.outside == pytest.approx(8 * 0.5 + 5)
    assert counted.rate == pytest.approx(18 / 22)
    assert course.gained == 22 + 1


def test_a_gap_is_between_the_ends_of_bytes_that_reached_the_main_network():
    course = Course({"a": 4, "b": 2}, stages=3)
    course.take(a_tick(one_byte("a", Chunk(1, 0, 0.9), Chunk(2, 0, 0.9), Chunk(2, 3, 0.9)), one_byte("b")), 1.0)
    seconds = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    # Offset 5 is the second byte of a's completion: it ends when the third comes. Chunks of stage 1 alone are no gaps.
    opened = {2: (Chunk(1, 5, 0.9), Chunk(2, 5, 0.9)), 3: (Chunk(1, 6, 0.9),), 5: (Chunk(1, 8, 0.9), Chunk(2, 8, 0.9))}
    for index, each in enumerate(seconds, start=1):
        course.take(a_tick(one_byte("a", *opened.get(index, ())), one_byte("b", ends=index == len(seconds))), each)
    # The prompt's last byte, offset 3, ended with the first tick; a's third byte came after 3 s, its sixth after 31 s.
    assert course.counted().gaps == pytest.approx((1.0 + 2.0, 4.0 + 8.0 + 16.0))


def test_a_chunk_that_has_not_ended_is_no_gap():
    course = Course({"a": 1}, stages=2)
    for index in range(20):
        # A verdict of a row that waits comes ticks before its byte ends.
        chunks = (Chunk(1, index, 0.9),) if index in (5, 10) else ()
        course.take(Tick(outputs=(Output(request_id="a", chunks=chunks),)) if index == 11 else a_tick(), 1.0)
        course.take(a_tick(one_byte("a", *chunks, ends=index == 19)), 1.0)
    # Offsets 5 and 10 end with bytes 5 and 10 of the completion, five times two ticks apart.
    assert course.counted().gaps == pytest.approx((10.0,))
    last = Course({"a": 1}, stages=2)
    for index in range(20):
        last.take(a_tick(one_byte("a", *((Chunk(1, index, 0.9),) if index in (5, 19) else ()), ends=index == 18)), 1.0)
    assert last.counted().gaps == pytest.approx((14.0,))
    assert last.chunk_lengths() == [[14]]


def test_lengths_are_in_positions_of_the_stage_below_and_of_whole_chunks_of_completions():
    course = Course({"a": 4, "b": 4}, stages=3)
    inner, outer = (0, 2, 4, 6, 7, 11, 12), (0, 4, 7, 12)
    chunks = [Chunk(1, start, 0.9) for start in inner] + [Chunk(2, start, 0.9) for start in outer]
    course.take(a_tick(Output(request_id="a", chunks=tuple(sorted(chunks, key=lambda each: each.start)))), 1.0)
    course.take(a_tick(Output(request_id="b", chunks=(Chunk(1, 5, 0.9), Chunk(1, 8, 0.9)))), 1.0)
    assert course.chunk_lengths() == [[2, 1, 4, 1, 3], [2, 2]]


def test_a_row_that_ends_too_early_and_a_row_that_fails_are_said():
    course = Course({"a": 1, "b": 1}, stages=2)
    course.take(a_tick(one_byte("a", ends=True)), 1.0)
    assert course.is_over
    with pytest.raises(TooShort, match="before anything could be counted"):
        course.counted()
    with pytest.raises(RuntimeError, match="request b: not finite"):
        course.take(a_tick(Output(request_id="b", finish_reason="error", error="not finite")), 1.0)
