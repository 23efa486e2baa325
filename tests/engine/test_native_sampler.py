"""The native sampler against the torch one that defines it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hnet_runtime.engine import utf8
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.sampler import NativeSampler, RowSampling, Sampler
from hnet_runtime.ops.native.library import open_library


@pytest.fixture(scope="module")
def samplers() -> tuple[Sampler, Sampler]:
    library = open_library()
    if library is None:
        pytest.skip("no native library is built here")
    return Sampler(torch.device("cpu")), NativeSampler(library.calls)


def rows(seed: int, count: int) -> list[RowSampling]:
    """Rows of all kinds: greedy and not, cut in every way, masked and not."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 6, generator=generator).tolist()
    return [
        RowSampling(
            SamplingParams(
                temperature=0.0 if index % 5 == 0 else 0.05 + 2 * a,
                top_k=int(b * 300) if index % 3 == 0 else 0,
                top_p=max(c, 0.01) if index % 4 < 2 else 1.0,
                min_p=d * 0.3 if index % 7 < 3 else 0.0,
            ),
            utf8.ANY_BYTE if index % 2 else utf8.mask_row(utf8.START, 1 + int(e * 4), may_end=bool(index % 3)),
            f,
        )
        for index, (a, b, c, d, e, f) in enumerate(draws)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_both_draw_the_same_bytes(samplers, seed):
    torch_sampler, native_sampler = samplers
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    some = rows(seed, 64)
    assert native_sampler.draw(logits, some) == torch_sampler.draw(logits, some)


@pytest.mark.parametrize("seed", range(20))
def test_both_draw_the_same_bytes_of_those_allowed(samplers, seed):
    torch_sampler, native_sampler = samplers
    generator = np.random.default_rng(seed)
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    some = []
    for index, row in enumerate(rows(seed, 64)):
        allowed = generator.random(256) < generator.choice([0.01, 0.3, 0.99])
        allowed[generator.integers(256)] = True
        some.append(replace(row, allowed=allowed) if index % 3 else row)
    drawn = native_sampler.draw(logits, some)
    assert drawn == torch_sampler.draw(logits, some)
    for row, byte in zip(some, drawn, strict=True):
        assert row.allowed is None or row.allowed[byte]
    alone = [native_sampler.draw(logits[i : i + 1], [row])[0] for i, row in enumerate(some)]
    assert drawn == alone


def test_ties_go_to_the_lowest_byte(samplers):
    logits = torch.zeros(1, 256)
    greedy = [RowSampling(SamplingParams(temperature=0.0), utf8.ANY_BYTE, 0.0)]
    for sampler in samplers:
        assert sampler.draw(logits, greedy) == [0]


def test_the_largest_uniform_number_still_draws_a_byte_that_may_come(samplers):
    logits = torch.full((1, 256), -1e30)
    logits[0, :3] = torch.tensor([0.1, 0.2, 0.3])
    row = [RowSampling(SamplingParams(temperature=1.0, top_k=2), utf8.ANY_BYTE, 1.0 - 2.0**-53)]
    for sampler in samplers:
        assert sampler.draw(logits, row) == [2]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_draws_nothing_and_no_other_suffers(samplers, poison):
    logits = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    some = rows(1, 8)
    clean = [sampler.draw(logits, some) for sampler in samplers]
    logits[3, 200] = poison
    for sampler, before in zip(samplers, clean, strict=True):
        after = sampler.draw(logits, some)
        assert after[3] is None
        assert [*after[:3], *after[4:]] == [*before[:3], *before[4:]]
