"""Counter-based randomness: a number is a function of seed, choice and index alone."""

from __future__ import annotations

import random

import pytest

from hnet_runtime.engine.request import RandomStream

MASK = 2**64 - 1


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011), as Python integers."""
    x, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(second >> 64) ^ x[1] ^ k0, second & MASK, (first >> 64) ^ x[3] ^ k1, first & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x


@pytest.mark.parametrize(("seed", "choice"), [(0, 0), (7, 1), (-1, 0), (2**63, 3), (-(2**70) - 5, 2), (123456789, 255)])
def test_numbers_are_philox_at_the_index(seed, choice):
    stream = RandomStream(seed, choice)
    for index in (0, 1, 2, 3, 4, 255, 256, 257, 1000, 100_003):
        # numpy counts before it draws, so the first block of four has counter 1.
        word = philox((seed % 2**64, choice % 2**64), index // 4 + 1)[index % 4]
        assert stream[index] == (word >> 11) * 2.0**-53


def test_the_order_of_access_changes_nothing():
    indices = [*range(0, 1100, 7), 0, 255, 256, 511, 512, 513]
    forward = RandomStream(42, 0)
    expected = {index: forward[index] for index in sorted(indices)}
    random.Random(1).shuffle(indices)
    shuffled = RandomStream(42, 0)
    assert {index: shuffled[index] for index in indices} == expected
    assert {index: RandomStream(42, 0)[index] for index in indices} == expected


def test_seeds_and_choices_have_streams_of_their_own():
    streams = {
        (seed, choice): tuple(RandomStream(seed, choice)[i] for i in range(8))
        for seed in (0, 1, -1, 2**32, 2**62)
        for choice in (0, 1, 2)
    }
    assert len(set(streams.values())) == len(streams)


def test_numbers_lie_in_the_unit_interval_and_spread_evenly():
    stream = RandomStream(3, 0)
    numbers = [stream[i] for i in range(20_000)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    counts = [0] * 20
    for number in numbers:
        counts[int(number * 20)] += 1
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts)
    assert chi_square < 45  # 19 degrees of freedom; the seed is fixed
