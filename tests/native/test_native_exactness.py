"""One row, one truth, natively: every number of a row is a function of its bytes alone, to the bit.

For each library, in float32, bfloat16 and int8. Between two libraries bits may differ, and do.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hnet_runtime.state.arenas import AttentionState

NAN = float("nan")
NUMBERS = ["float32", "bfloat16", "int8"]

TEXTS = [
    b"\xfe" + "Grüße, 世界! 🦊 naïve café — Привет, мир".encode() * 2,
    b"\xfe" + b"Once upon a time there was a clockmaker who owned 31 clocks, none of which agreed. " * 2,
    b"\xfe" + b"T" * 110,
    b"\xfe" + bytes(range(256))[:170],
    b"\xfe" + b"x = [f(y) for y in range(10)]\n\n\treturn x, {'a': 1}\n" * 3,
    b"not even a BOS in front of this one, which is a hundred and more bytes long, for what it is worth here.",
    b"\xfe" + b"\x80\xff\x00\xc3" * 26,
]


def text(index: int, length: int) -> bytes:
    """As many texts as there are numbers, no two alike: each begins somewhere else in one of TEXTS."""
    source = TEXTS[index % len(TEXTS)]
    return b"\xfe" + bytes([index % 251]) + (source[index % 23 :] * 3)[: length - 2]


def bits(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int32)


def assert_same(heard, expected, positions: int | None = None) -> None:
    """Logits and verdicts equal to the bit; of the first `positions` bytes, if not all."""
    count = len(expected.logits) if positions is None else positions
    assert torch.equal(bits(heard.logits[:count]), bits(expected.logits[:count]))
    for said, truth in zip(heard.verdicts, expected.verdicts, strict=True):
        assert [verdict for verdict in said if verdict[0] < count] == [
            verdict for verdict in truth if verdict[0] < count
        ]


@pytest.fixture
def model_named(case_named, native_of):
    """`model_named(name, numbers, threads=1)`"""

    def build(name: str, numbers: str, threads: int = 1):
        return native_of(*case_named(name), numbers, threads=threads)

    return build


# ── how a text is cut ─────────────────────────────────────────────────────────────────────────

LAYOUTS = [
    "three_routed_stages",
    "four_routed_stages",
    "mixed_letters",
    "window_zero",
    "window_larger_than_prompt",
    "odd_head_dims",
    "without_rotary",
    "state_16_and_48_conv_3",
    "conv_2_expand_3",
    "bytes_through_mixed_main",
]


def random_cuts(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    cuts = []
    while sum(cuts) < length:
        cuts.append(min(rng.choice([1, 2, 3, rng.randrange(1, 20), rng.randrange(1, 90)]), length - sum(cuts)))
    return cuts


@pytest.mark.parametrize("numbers", [*NUMBERS, "int8_bfloat16"])
@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "e_iso_T2", "demo"])
def test_a_text_gives_the_same_numbers_in_spans_of_any_length(model_named, rows_of, name, numbers):
    rows = rows_of(model_named(name, numbers), num_rows=2)
    for index in (0, 3):
        data = TEXTS[index]
        whole = rows.run(1, data)
        assert whole.logits.isfinite().all()
        for span in (1, 7, 64):
            assert_same(rows.run(1 + span % 2, data, span), whole)
        for seed in range(2):
            rows.open(2)
            at = 0
            for size in random_cuts(len(data), seed):
                rows.feed({2: data[at : at + size]})
                at += size
            assert_same(rows.close(2), whole)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_text_gives_the_same_numbers_in_spans_in_any_layout(model_named, rows_of, name, numbers):
    rows = rows_of(model_named(name, numbers), num_rows=2)
    whole = rows.run(1, TEXTS[1][:130])
    for span in (1, 23):
        assert_same(rows.run(2, TEXTS[1][:130], span), whole)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_spans_around_the_borders_of_pages_change_nothing(model_named, rows_of, numbers):
    for name in ("b_2stage", "e_iso_T2"):
        rows = rows_of(model_named(name, numbers), num_rows=2)
        data = TEXTS[3]
        whole = rows.run(2, data)
        for first, second in ((63, 1), (63, 2), (64, 1), (65, 63), (1, 64), (127, 2)):
            rows.open(2)
            for piece in (data[:first], data[first : first + second], data[first + second :]):
                rows.feed({2: piece})
            assert_same(rows.close(2), whole)


def test_every_arena_holds_the_same_bits_after_steps_and_after_one_span(model_named, rows_of):
    for name in ("b_2stage", "mixed_letters"):
        for numbers in NUMBERS:
            rows = rows_of(model_named(name, numbers), num_rows=2)
            states = []
            for span in (1, 200):
                rows.open(1)
                for begin in range(0, 100, span):
                    rows.feed({1: TEXTS[1][begin : min(begin + span, 100)]})
                states.append([tensor.clone() for stage in rows.state.stages for tensor in stage.tensors()])
                rows.close(1)
            for stepped, whole in zip(*states, strict=True):
                assert torch.equal(stepped, whole)


# ── who is beside it ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["b_2stage", "demo"])
def test_a_row_has_the_same_bits_among_any_number_of_rows(model_named, rows_of, name, numbers):
    """1 to 33 rows: prompts in one forward, then steps together. A library's tiles are of 1, 2, 4, 8 and 16 rows."""
    rows = rows_of(model_named(name, numbers), num_rows=33, max_positions=128)
    texts = {row: text(row, 30 + row % 5) for row in range(1, 34)}
    alone = {row: rows.run(34 - row, data) for row, data in texts.items()}
    for count in (1, 2, 3, 5, 8, 16, 33):
        first = 1 + count % 7
        company = [first + index for index in range(count)] if count < 33 else list(range(1, 34))
        for row in company:
            rows.open(row)
        rows.feed({row: texts[row][: 10 + row % 11] for row in company})
        for step in range(10):
            rows.feed({row: texts[row][10 + row % 11 + step :][:1] for row in company})
        for row in company:
            assert_same(rows.close(row), alone[row], 20 + row % 11)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_every_layout_has_the_same_bits_in_a_crowd_that_comes_in_pieces(generated, native_of, rows_of, numbers):
    rows = rows_of(native_of(generated.config, generated.weights, numbers), num_rows=4, max_positions=128)
    texts = {row: text(row, 40 + 6 * row) for row in range(1, 5)}
    alone = {row: rows.run(5 - row, data) for row, data in texts.items()}
    rng = random.Random(2)
    for row in texts:
        rows.open(row)
    fed = dict.fromkeys(texts, 0)
    while left := [row for row in texts if fed[row] < len(texts[row])]:
        turn = rng.sample(left, rng.randrange(1, len(left) + 1))
        pieces = {row: texts[row][fed[row] :][: rng.choice([1, 3, 20, 66])] for row in turn}
        rows.feed(pieces)
        for row, piece in pieces.items():
            fed[row] += len(piece)
    for row in texts:
        assert_same(rows.close(row), alone[row])


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["b_2stage", "e_iso_T2", "mixed_letters"])
def test_the_order_of_rows_in_a_forward_changes_nothing(model_named, rows_of, name, numbers):
    rows = rows_of(model_named(name, numbers), num_rows=5)
    heard = []
    for order in ((1, 2, 3, 4, 5), (5, 3, 1, 2, 4), (2, 4, 1, 5, 3)):
        for row in order:
            rows.open(row)
        rows.feed({row: TEXTS[row][: 3 * row] for row in order})
        for step in range(15):
            rows.feed({row: TEXTS[row][3 * row + step :][:1] for row in order})
        rows.feed({row: TEXTS[row][3 * row + 15 : 70] for row in order})
        heard.append({row: rows.close(row) for row in order})
    for other in heard[1:]:
        for row in range(1, 6):
            assert_same(other[row], heard[0][row])


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["b_2stage", "mixed_letters", "demo"])
def test_a_row_that_another_sequence_had_before_shows_no_trace_of_it(model_named, rows_of, name, numbers):
    model = model_named(name, numbers)
    rows = rows_of(model, num_rows=1)
    for data in (TEXTS[2], TEXTS[1], TEXTS[0], TEXTS[2]):
        fresh = rows_of(model, num_rows=1).run(1, data[:90], 9)
        assert_same(rows.run(1, data[:90], 31), fresh)


# ── threads ───────────────────────────────────────────────────────────────────────────────────

WIDE = ["m1", ["T1m1", ["T1"], "m1T1"], "m1t1"]


@cache
def wide_case(make_case):
    """Wide enough that a step wakes the other threads, at widths that no count of threads divides."""
    return make_case(3, WIDE, [448, 512, 576], num_heads=8, window_size=[15, -1, -1])


@pytest.mark.parametrize("numbers", NUMBERS)
def test_one_thread_and_three_give_the_same_bits(make_case, native_of, rows_of, numbers):
    config, weights = wide_case(make_case)
    heard: list[list[object]] = []
    for threads in (1, 2, 3):
        rows = rows_of(native_of(config, weights, numbers, threads=threads), num_rows=9, max_positions=128)
        texts = {row: text(row, 25 + row) for row in range(1, 10)}
        for row in texts:
            rows.open(row)
        rows.feed({1: texts[1][:1]})
        rows.feed({row: data[(row == 1) : 14 + row] for row, data in texts.items()})
        for step in range(6):
            rows.feed({row: data[14 + row + step :][:1] for row, data in texts.items() if row <= 9 - step})
        heard.append([rows.close(row) for row in texts])
    for other in heard[1:]:
        for found, expected in zip(other, heard[0], strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_crowd_on_two_threads_is_each_row_alone_on_one(make_case, native_of, rows_of, numbers):
    config, weights = wide_case(make_case)
    single = rows_of(native_of(config, weights, numbers), num_rows=1, max_positions=128)
    rows = rows_of(native_of(config, weights, numbers, threads=2), num_rows=5, max_positions=128)
    texts = {row: text(row + 40, 40) for row in range(1, 6)}
    for row in texts:
        rows.open(row)
    for begin in range(0, 40, 8):
        rows.feed({row: data[begin : begin + 8] for row, data in texts.items()})
    for row, data in texts.items():
        assert_same(rows.close(row), single.run(1, data, 20))


# ── what is not finite ────────────────────────────────────────────────────────────────────────


def fill(rows, value: float) -> None:
    """Every arena, rows that nobody has and free pages too."""
    for stage in rows.state.stages:
        for tensor in stage.tensors():
            tensor.fill_(value)


def poison(rows, row: int) -> None:
    """Everything the row remembers becomes NaN: states, its pages and rings."""
    for stage in rows.state.stages:
        for layers in stage.stacks.values():
            for layer in layers:
                if not isinstance(layer, AttentionState):
                    layer.conv[row] = NAN
                    layer.ssm[row] = NAN
                elif count := int(stage.positions[row]):
                    positions = torch.arange(count).numpy()[None, :]
                    slots = torch.from_numpy(stage.slots.slots(torch.tensor([[row]]).numpy(), positions)).flatten()
                    layer.k[slots] = NAN
                    layer.v[slots] = NAN
        if stage.router is not None:
            stage.router[row] = NAN
            stage.ema[row] = NAN


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "e_iso_T2", "mixed_letters", "window_zero"])
def test_a_row_full_of_nan_spoils_no_other(model_named, rows_of, name, numbers):
    rows = rows_of(model_named(name, numbers), num_rows=4)
    texts = {row: text(row, 70) for row in (1, 2, 3, 4)}
    alone = {row: rows.run(row, data) for row, data in texts.items()}
    for row in texts:
        rows.open(row)
        rows.feed({row: texts[row][:30]})
    poison(rows, 2)
    rows.feed({4: texts[4][30:31], 2: texts[2][30:31], 1: texts[1][30:31]})
    assert rows.heard[2].logits[-1].isnan().any()
    rows.feed({2: texts[2][31:50], 3: texts[3][30:], 1: texts[1][31:40]})
    rows.feed({1: texts[1][40:], 2: texts[2][50:], 4: texts[4][31:]})
    for row in (1, 3, 4):
        assert_same(rows.close(row), alone[row])
    rows.close(2)
    # And the next sequence in that row, on those pages, is as if nothing had been.
    assert_same(rows.run(2, texts[2], 40), alone[2])


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["b_2stage", "e_iso_T2", "mixed_letters", "window_larger_than_prompt"])
def test_what_free_rows_pages_and_rings_hold_is_never_seen(model_named, rows_of, name, numbers, value):
    rows = rows_of(model_named(name, numbers), num_rows=3)
    texts = {row: text(row, 100) for row in (1, 3)}
    expected = {row: rows.run(row, data, 50) for row, data in texts.items()}
    fill(rows, value)
    for row in (1, 3):
        rows.open(row)
    for begin in range(0, 100, 19):
        rows.feed({row: texts[row][begin : begin + 19] for row in (3, 1)})
    for row in (1, 3):
        assert expected[row].logits.isfinite().all()
        assert_same(rows.close(row), expected[row])


def test_weights_full_of_nan_are_told_and_not_hidden(case_named, native_of, rows_of):
    """Logits that are no numbers reach the caller, who gives up the request; nothing is clamped on the way."""
    config, weights = case_named("b_2stage")
    spoilt = {key: tensor.clone() for key, tensor in weights.items()}
    spoilt["embeddings.weight"][ord("Q")] = NAN
    for numbers in NUMBERS:
        heard = rows_of(native_of(config, spoilt, numbers)).run(1, b"\xfe" + b"no question here: Q, then more")
        assert heard.logits[:19].isfinite().all()
        assert heard.logits[19:].isnan().all()


# ── any schedule ──────────────────────────────────────────────────────────────────────────────

TICKS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 70)), min_size=1, max_size=5, unique_by=lambda piece: piece[0]
    ),
    min_size=1,
    max_size=12,
)
_TRUTHS: dict[tuple[str, str, str, int], object] = {}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "mixed_letters", "three_routed_stages"])
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ticks=TICKS)
def test_no_schedule_of_rows_and_spans_changes_a_number(model_named, library, rows_of, name, numbers, ticks):
    """Rows begin again with the next text when theirs is read: resets happen in the middle of others' lives."""
    model = model_named(name, numbers)
    rows = rows_of(model, num_rows=5, max_positions=256)

    def truth(index: int):
        key = (library.isa, name, numbers, index)
        if key not in _TRUTHS:
            _TRUTHS[key] = rows_of(model, num_rows=1, max_positions=256).run(1, TEXTS[index])
        return _TRUTHS[key]

    text_of = {row: row for row in range(1, 6)}
    fed: dict[int, int] = {}
    for tick in ticks:
        pieces = {}
        for row, size in tick:
            if row not in rows.heard:
                rows.open(row)
                fed[row] = 0
            pieces[row] = TEXTS[text_of[row]][fed[row] : fed[row] + size]
            fed[row] += len(pieces[row])
        rows.feed(pieces)
        for row in pieces:
            if fed[row] == len(TEXTS[text_of[row]]):
                assert_same(rows.close(row), truth(text_of[row]))
                text_of[row] = (text_of[row] + 3) % len(TEXTS)
    for row, heard in rows.heard.items():
        assert_same(heard, truth(text_of[row]), fed[row])
