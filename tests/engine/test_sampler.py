"""The sampler against one row at a time in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.request import RandomStream
from hnet_runtime.engine.sampler import NativeSampler, RowSampling, Sampler, byte_logprobs
from hnet_runtime.ops.native.library import open_library

RAW = utf8.ANY_BYTE
LAST_BELOW_ONE = 1.0 - 2.0**-53
MASK_ROWS = [RAW, utf8.mask_row(utf8.START, 4, True), utf8.mask_row(utf8.START, 1, False), utf8.mask_row(3, 4, False)]


def noise(count: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(count, 256, generator=torch.Generator().manual_seed(seed)) * scale


def row(uniform: float = 0.5, mask_row: int = RAW, **params) -> RowSampling:
    return RowSampling(SamplingParams(**params), mask_row, uniform)


@pytest.fixture(params=["torch", "native"], scope="module")
def draw(request):
    """`draw(logits [B, 256], *rows) → B bytes`, on either path."""
    sampler = Sampler(torch.device("cpu"))
    if request.param == "native":
        library = open_library()
        if library is None:
            pytest.skip("no native library is built here")
        sampler = NativeSampler(library.calls)

    def drawn(logits: torch.Tensor, *rows: RowSampling) -> list[int | None]:
        return sampler.draw(logits.reshape(len(rows), 256), rows)

    return drawn


def naive_weights(logits: torch.Tensor, wanted: RowSampling) -> np.ndarray:
    """[256] unnormalised probabilities after mask, temperature, top-k, top-p and min-p."""
    params = wanted.params
    values = logits.double().numpy().copy()
    values[~utf8.mask_table()[wanted.mask_row]] = -np.inf
    weights = np.exp((values - values.max()) / params.temperature)
    order = sorted(range(256), key=lambda byte: (-weights[byte], byte))
    kept = order[: params.top_k or 256]
    if params.top_p < 1.0:
        total, before, inside = sum(weights[byte] for byte in kept), 0.0, []
        for byte in kept:
            if before < params.top_p * total:
                inside.append(byte)
            before += weights[byte]
        kept = inside
    kept = [byte for byte in kept if weights[byte] >= params.min_p * weights[order[0]]]
    return np.array([weights[byte] if byte in kept else 0.0 for byte in range(256)])


PARAMS = st.builds(
    dict,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.7, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 200, 256, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(PARAMS, st.sampled_from(MASK_ROWS), st.floats(0, LAST_BELOW_ONE), st.integers(0, 50))
def test_a_drawn_byte_is_the_inverse_of_the_cut_distributions_cumulative_sum(draw, params, mask_row, uniform, seed):
    wanted, logits = row(uniform, mask_row, **params), noise(1, seed)[0]
    weights = naive_weights(logits, wanted)
    cumulative = weights.cumsum() / weights.sum()
    assume(np.abs(cumulative - uniform).min() > 1e-12 or uniform == 0.0)  # rounding may decide on a border
    expected = next(byte for byte in range(256) if cumulative[byte] > uniform)
    assert draw(logits, wanted) == [expected]


def test_which_bytes_can_come_at_all_is_what_the_cuts_leave(draw):
    grid = np.linspace(0, LAST_BELOW_ONE, 4001)
    for seed, params in enumerate(
        [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5}]
    ):
        logits = noise(1, seed)[0]
        rows = [row(float(uniform), **params) for uniform in grid]
        found = set(draw(logits.expand(len(rows), 256), *rows))
        weights = naive_weights(logits, rows[0])
        assert found <= set(np.flatnonzero(weights).tolist())
        assert found >= set(np.flatnonzero(weights / weights.sum() > 1e-3).tolist())


# ── one row, one truth ────────────────────────────────────────────────────────────────────────


def test_a_row_draws_the_same_byte_alone_and_in_a_crowd(draw):
    generator = np.random.default_rng(1)
    count = 200
    logits = noise(count, 9)
    rows = [
        row(
            float(generator.random()),
            MASK_ROWS[int(generator.integers(len(MASK_ROWS)))],
            temperature=float(generator.choice([0.0, 0.3, 1.0, 4.0])),
            top_k=int(generator.choice([0, 0, 3, 40])),
            top_p=float(generator.choice([1.0, 1.0, 0.9, 0.2])),
            min_p=float(generator.choice([0.0, 0.0, 0.1])),
        )
        for _ in range(count)
    ]
    alone = [draw(logits[i], rows[i])[0] for i in range(count)]
    assert draw(logits, *rows) == alone
    order = generator.permutation(count)
    assert draw(logits[order], *(rows[i] for i in order)) == [alone[i] for i in order]


def test_the_cut_of_another_row_changes_nothing(draw):
    logits = noise(2)
    for uniform in np.linspace(0, LAST_BELOW_ONE, 97):
        plain = row(float(uniform), temperature=1.3)
        (alone,) = draw(logits[0], plain)
        assert draw(logits, plain, row(0.3, top_k=2, top_p=0.5, min_p=0.5))[0] == alone
        assert draw(logits, plain, row(0.3, temperature=0.0))[0] == alone


# ── greedy ────────────────────────────────────────────────────────────────────────────────────


def test_greedy_takes_the_largest_and_ties_go_to_the_lowest_byte(draw):
    logits = torch.zeros(1, 256)
    logits[0, [200, 17, 90]] = 4.0
    for beside in ([], [row(0.5)]):
        found = draw(logits.expand(1 + len(beside), 256), row(temperature=0.0), *beside)
        assert found[0] == 17
    assert draw(torch.zeros(1, 256), row(temperature=0.0)) == [0]


def test_greedy_passes_over_what_the_mask_forbids(draw):
    logits = torch.zeros(1, 256)
    logits[0, 0xFF], logits[0, 0xC3], logits[0, 65] = 9.0, 8.0, 7.0
    assert draw(logits, row(0.0, utf8.mask_row(utf8.START, 1, False), temperature=0.0)) == [65]
    assert draw(logits, row(0.0, utf8.mask_row(utf8.START, 2, False), temperature=0.0)) == [0xC3]
    assert draw(logits, row(0.0, utf8.mask_row(utf8.START, 2, True), temperature=0.0)) == [0xFF]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_the_sharpest_cut_is_greedy(draw, params):
    logits = noise(20, 3)
    for uniform in (0.0, 0.4, LAST_BELOW_ONE):
        assert draw(logits, *[row(uniform, **params)] * 20) == logits.argmax(-1).tolist()


def test_top_k_of_equals_keeps_the_lowest_bytes(draw):
    logits = torch.zeros(1, 256)
    grid = np.linspace(0, LAST_BELOW_ONE, 300)
    found = {draw(logits, row(float(uniform), top_k=3))[0] for uniform in grid}
    assert found == {0, 1, 2}
    assert {draw(logits, row(float(uniform), min_p=1.0))[0] for uniform in grid} == set(range(256))


@pytest.mark.parametrize(("top_p", "count"), [(1e-9, 1), (0.125, 1), (0.126, 2), (0.5, 4), (0.51, 5), (0.999, 8)])
def test_top_p_keeps_the_fewest_bytes_that_reach_it(draw, top_p, count):
    """Eight bytes of one eighth each, so that sums are exact."""
    logits = torch.full((1, 256), -1e4)
    logits[0, 10:18] = 1.0
    grid = np.linspace(0, LAST_BELOW_ONE, 200)
    found = {draw(logits, row(float(uniform), top_p=top_p))[0] for uniform in grid}
    assert found == set(range(10, 10 + count))


# ── extremes ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30, 1e-3])
@pytest.mark.parametrize("mask_row", MASK_ROWS)
def test_a_temperature_near_zero_is_greedy_and_no_overflow(draw, temperature, mask_row):
    logits = noise(8, 4)
    for uniform in (1e-15, 0.5, LAST_BELOW_ONE):
        greedy = draw(logits, *[row(uniform, mask_row, temperature=0.0)] * 8)
        assert draw(logits, *[row(uniform, mask_row, temperature=temperature)] * 8) == greedy


@pytest.mark.parametrize("temperature", [1e6, 1e300, 1.7e308])
def test_a_huge_temperature_draws_evenly_from_what_is_allowed(draw, temperature):
    logits, mask_row = noise(1, 5)[0], utf8.mask_row(utf8.START, 1, False)
    grid = (np.arange(128 * 4) + 0.5) / (128 * 4)
    rows = [row(float(uniform), mask_row, temperature=temperature) for uniform in grid]
    assert draw(logits.expand(len(rows), 256), *rows) == [byte for byte in range(128) for _ in range(4)]


@pytest.mark.parametrize("top_k", [256, 257, 10**6, 2**63, 2**80])
def test_a_top_k_beyond_all_bytes_cuts_nothing(draw, top_k):
    logits = noise(1, 6)
    for uniform in np.linspace(0, LAST_BELOW_ONE, 50):
        assert draw(logits, row(float(uniform), top_k=top_k)) == draw(logits, row(float(uniform)))


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, LAST_BELOW_ONE])
def test_a_byte_of_no_probability_never_comes(draw, uniform):
    logits = torch.full((1, 256), -1e4)
    logits[0, [3, 250]] = 0.0
    assert draw(logits, row(uniform, temperature=1.0))[0] in (3, 250)
    logits[0, 250] = -1e4
    assert draw(logits, row(uniform, temperature=1.0)) == [3]


@pytest.mark.parametrize("uniform", [0.0, 0.1, 0.9, LAST_BELOW_ONE])
@pytest.mark.parametrize("temperature", [0.0, 1e-310, 1.0, 1e308])
def test_the_mask_is_respected_always(draw, uniform, temperature):
    table = utf8.mask_table()
    count = len(table)
    for cuts in ({}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 300, "top_p": 0.999, "min_p": 1e-9}):
        rows = [row(uniform, mask_row, temperature=temperature, **cuts) for mask_row in range(count)]
        for mask_row, byte in enumerate(draw(noise(count, 7, scale=30.0), *rows)):
            assert table[mask_row, byte]


# ── frequencies ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"temperature": 2.0, "top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}]
)
def test_bytes_come_as_often_as_their_probability_says(draw, params):
    logits, stream, draws = noise(1, 8, scale=2.0)[0], RandomStream(11, 0), 20_000
    rows = [row(stream[index], **params) for index in range(draws)]
    counts = np.bincount(draw(logits.expand(draws, 256), *rows), minlength=256)
    weights = naive_weights(logits, rows[0])
    expected = draws * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum())
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations; the seed is fixed


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────


def test_logprobs_are_those_of_log_softmax():
    logits, data = noise(40, 12), bytes(range(40))
    exact = torch.log_softmax(logits.double(), -1)
    found = byte_logprobs(logits, data, [256] * 40)
    for t, entry in enumerate(found):
        assert entry.byte == data[t]
        assert entry.logprob == pytest.approx(float(exact[t, data[t]]), abs=1e-12)
        assert [byte for byte, _ in entry.top] == torch.argsort(-exact[t], stable=True).tolist()
        assert [value for _, value in entry.top] == pytest.approx(
            exact[t].sort(descending=True).values.tolist(), abs=1e-12
        )
        assert dict(entry.top)[entry.byte] == entry.logprob
        assert entry.top[entry.rank - 1][0] == entry.byte
        assert sum(np.exp(value) for _, value in entry.top) == pytest.approx(1.0)


def test_each_row_gets_as_many_alternatives_as_it_asks_for():
    logits = noise(4, 13)
    found = byte_logprobs(logits, b"abcd", [0, 3, 256, 1])
    assert [len(entry.top) for entry in found] == [0, 3, 256, 1]
    alone = [byte_logprobs(logits[i : i + 1], b"abcd"[i : i + 1], [256])[0] for i in range(4)]
    for entry, whole in zip(found, alone, strict=True):
        assert entry.logprob == whole.logprob  # to the bit, whoever is beside it
        assert entry.top == whole.top[: len(entry.top)]


def test_ties_are_listed_from_the_lowest_byte():
    logits = torch.zeros(1, 256)
    logits[0, [9, 200, 41]] = 2.0
    (entry,) = byte_logprobs(logits, b"\x05", [6])
    assert [byte for byte, _ in entry.top] == [9, 41, 200, 0, 1, 2]
    assert entry.rank == 9


def test_logprobs_of_extreme_logits_are_finite_and_of_no_bytes_are_none():
    logits = torch.full((1, 256), -3e38)
    logits[0, 7] = 3e38
    (entry,) = byte_logprobs(logits, b"\x00", [2])
    assert np.isfinite(entry.logprob)
    assert entry.top[0] == (7, 0.0)
    assert byte_logprobs(torch.zeros(0, 256), b"", []) == []
