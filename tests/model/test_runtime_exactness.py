"""One row, one truth: every number of a row is a function of its bytes alone, to the bit, in fp32 on a CPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.config import ModelConfig
from hnet_runtime.state.arenas import AttentionState, Mamba2State
from tests import crowds
from tests.crowds import TEXTS, assert_same

NAN = float("nan")
NUM_ROWS = 16


@cache
def demo() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    source = locate("demo")
    return source.config, load_weights(source, dtype=torch.float32)


@pytest.fixture
def model_named(golden_case, make_named_case, model_of):
    """A model by the name of a golden case, of a generated one, or `demo`."""

    def build(name: str):
        if name == "demo":
            return model_of(*demo())
        case = golden_case(name) if name in GOLDEN else make_named_case(name)
        return model_of(case.config, case.weights)

    return build


GOLDEN = ["a_1stage", "b_2stage", "e_iso_T2"]
SERVED = [*GOLDEN, "demo"]
LAYOUTS = [
    "three_routed_stages",
    "four_routed_stages",
    "equal_widths",
    "mixed_letters",
    "mamba_main",
    "window_smaller_than_prompt",
    "window_larger_than_prompt",
    "window_zero",
    "tied_embeddings",
    "odd_head_dims",
    "without_rotary",
    "state_16_and_48_conv_3",
    "conv_2_expand_3",
    "bytes_through_mamba_alone",
    "bytes_through_mixed_main",
]


# ── how a text is cut ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SERVED + LAYOUTS)
def test_a_text_gives_the_same_numbers_in_spans_of_any_length(model_named, rows_of, name):
    rows = rows_of(model_named(name), num_rows=2)
    for text in (TEXTS[2], TEXTS[3]) if name in SERVED else (TEXTS[3][:130],):
        whole = rows.run(1, text)
        for span in (1, 7, 64) if name in SERVED else (1, 23):
            assert_same(rows.run(1, text, span), whole)


@pytest.mark.parametrize("name", SERVED)
def test_spans_around_the_borders_of_pages_and_blocks_change_nothing(model_named, rows_of, name):
    rows = rows_of(model_named(name), num_rows=2)
    text = TEXTS[5][:195]
    whole = rows.run(2, text)
    for first, second in ((63, 1), (63, 2), (64, 1), (65, 63), (1, 64), (127, 2), (128, 65)):
        rows.open(2)
        for piece in (text[:first], text[first : first + second], text[first + second :]):
            rows.feed({2: piece})
        assert_same(rows.close(2), whole)


# ── who is beside it ──────────────────────────────────────────────────────────────────────────


def crowd_against_alone(model, rows_of, texts: list[bytes], seed: int) -> None:
    rows = rows_of(model, num_rows=NUM_ROWS)
    alone = {text: rows.run(1 + index % NUM_ROWS, text) for index, text in enumerate(texts)}
    crowds.crowd_against_alone(rows, alone.__getitem__, texts, seed)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SERVED)
def test_a_row_is_bitwise_equal_alone_and_among_15_others(model_named, rows_of, name, seed):
    crowd_against_alone(model_named(name), rows_of, TEXTS, seed)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_of_any_layout_is_bitwise_equal_alone_and_in_a_crowd(model_named, rows_of, name):
    texts = [text[:90] for text in TEXTS[2:11]]
    crowd_against_alone(model_named(name), rows_of, texts, seed=3)


@pytest.mark.parametrize("name", ["b_2stage", "demo"])
def test_more_texts_than_rows_take_turns_without_a_trace(model_named, rows_of, name):
    """Sixteen rows hand themselves on: what a row held before never shows."""
    rows = rows_of(model_named(name), num_rows=1)
    for text in (TEXTS[4], TEXTS[3], TEXTS[2], TEXTS[4]):
        fresh = rows_of(rows.model, num_rows=1).run(1, text[:100], 9)
        assert_same(rows.run(1, text[:100], 31), fresh)


@pytest.mark.parametrize("name", ["b_2stage", "e_iso_T2", "mixed_letters"])
def test_the_order_of_rows_in_a_step_changes_nothing(model_named, rows_of, name):
    rows = rows_of(model_named(name), num_rows=5)
    orders = [(1, 2, 3, 4, 5), (5, 3, 1, 2, 4), (2, 4, 1, 5, 3)]
    heard = []
    for order in orders:
        for row in order:
            rows.open(row)
        for position in range(20):
            rows.feed({row: TEXTS[row + 2][position : position + 1] for row in order})
        heard.append({row: rows.close(row) for row in order})
    for other in heard[1:]:
        for row in orders[0]:
            assert_same(other[row], heard[0][row])


# ── threads ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow  # two threads wait for each other at every small product
@pytest.mark.parametrize("name", SERVED)
def test_rows_are_exact_with_two_threads(model_named, rows_of, threads, name):
    threads(2)
    assert torch.get_num_threads() == 2
    crowd_against_alone(model_named(name), rows_of, TEXTS[2:8], seed=4)


def test_wide_rows_are_exact_with_two_threads(make_case, model_of, rows_of, threads):
    """Wide enough that torch does share elementwise work and sums out among threads."""
    config, weights = make_case(11, ["m1", ["T1"], "m1"], [256, 320])
    threads(2)
    crowd_against_alone(model_of(config, weights), rows_of, [text[:40] for text in TEXTS[2:6]], seed=5)


# ── what is not finite ────────────────────────────────────────────────────────────────────────


def poison(rows, row: int) -> None:
    """Everything the row remembers becomes NaN."""
    for stage in rows.state.stages:
        for layers in stage.stacks.values():
            for layer in layers:
                if isinstance(layer, Mamba2State):
                    layer.conv[row] = NAN
                    layer.ssm[row] = NAN
                elif isinstance(layer, AttentionState):
                    count = int(stage.positions[row])
                    if count:
                        positions = torch.arange(count).numpy()[None, :]
                        slots = torch.from_numpy(stage.slots.slots(torch.tensor([[row]]).numpy(), positions)).flatten()
                        layer.k[slots] = NAN
                        layer.v[slots] = NAN
        if stage.router is not None:
            stage.router[row] = NAN
            stage.ema[row] = NAN


@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "e_iso_T2", "mixed_letters", "window_zero"])
def test_a_row_full_of_nan_spoils_no_other(model_named, rows_of, name):
    rows = rows_of(model_named(name), num_rows=4)
    texts = {1: TEXTS[3][:80], 2: TEXTS[5][:100], 3: TEXTS[2], 4: TEXTS[6][:90]}
    alone = {row: rows.run(row, text) for row, text in texts.items()}
    for row in texts:
        rows.open(row)
        rows.feed({row: texts[row][:30]})
    poison(rows, 2)
    rows.feed({4: texts[4][30:31], 2: texts[2][30:31], 1: texts[1][30:31]})
    assert rows.heard[2].logits[-1].isnan().any()
    rows.feed({2: texts[2][31:70], 3: texts[3][30:], 1: texts[1][31:40]})
    rows.feed({1: texts[1][40:], 2: texts[2][70:], 4: texts[4][31:]})
    for row in (1, 3, 4):
        assert_same(rows.close(row), alone[row])
    rows.close(2)
    # And the next one in that row, on those pages, is as if nothing had been.
    assert_same(rows.run(2, texts[2], 40), alone[2])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "e_iso_T2", "mixed_letters", "window_larger_than_prompt"])
def test_what_freed_pages_and_rings_still_hold_is_never_seen(model_named, rows_of, name, value):
    rows = rows_of(model_named(name), num_rows=3)
    expected = {row: rows.run(row, TEXTS[row + 2][:120], 50) for row in (1, 3)}
    for stage in rows.state.stages:
        for layers in stage.stacks.values():
            for layer in layers:
                if isinstance(layer, AttentionState):
                    layer.k.fill_(value)
                    layer.v.fill_(value)
                else:  # of rows that nobody has, the padding row with them; open() resets the others
                    layer.conv.fill_(value)
                    layer.ssm.fill_(value)
        if stage.router is not None:
            stage.router.fill_(value)
            stage.ema.fill_(value)
    for row in (1, 3):
        rows.open(row)
    for begin in range(0, 120, 19):
        rows.feed({row: TEXTS[row + 2][begin : min(begin + 19, 120)] for row in (3, 1) if TEXTS[row + 2][begin:120]})
    for row in (1, 3):
        assert expected[row].logits.isfinite().all()
        assert_same(rows.close(row), expected[row])


# ── any schedule ──────────────────────────────────────────────────────────────────────────────

TICKS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 70)), min_size=1, max_size=5, unique_by=lambda piece: piece[0]
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("name", ["a_1stage", "b_2stage", "e_iso_T2", "mixed_letters", "three_routed_stages"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ticks=TICKS)
def test_no_schedule_of_rows_and_spans_changes_a_number(model_named, rows_of, name, ticks):
    """Rows begin again with the next text when theirs is read: resets happen in the middle of others' lives."""
    model = model_named(name)
    rows = rows_of(model, num_rows=5, max_positions=256)
    text_of: dict[int, int] = {}
    fed: dict[int, int] = {}
    for tick in ticks:
        pieces = {}
        for row, size in tick:
            text = text_of.setdefault(row, row + 1)
            if row not in rows.heard:
                rows.open(row)
                fed[row] = 0
            piece = TEXTS[text][fed[row] : fed[row] + size]
            pieces[row] = piece
            fed[row] += len(piece)
        rows.feed(pieces)
        for row in pieces:
            if fed[row] == len(TEXTS[text_of[row]]):
                assert_same(rows.close(row), truth(name, model, rows_of, text_of[row]))
                text_of[row] = (text_of[row] + 5) % len(TEXTS)
    for row, heard in rows.heard.items():
        assert_same(heard, truth(name, model, rows_of, text_of[row]), fed[row])


_TRUTHS: dict[tuple[type, str, int], object] = {}


def truth(name: str, model, rows_of, text: int):
    """The text alone, whole: computed once a model."""
    key = (type(model), name, text)
    if key not in _TRUTHS:
        _TRUTHS[key] = rows_of(model, num_rows=1, max_positions=256).run(1, TEXTS[text])
    return _TRUTHS[key]
