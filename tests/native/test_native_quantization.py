"""Packed layouts, 8-bit weights, and what fewer bits cost on English text with the demo model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnet_runtime.ops.native import binding
from hnet_runtime.ops.native.packing import PackedMatrix, pack, quantize

SIZES = [(1, 1), (3, 5), (16, 32), (17, 31), (65, 64), (130, 257)]  # N, K
KINDS = {torch.float32: binding.FLOAT32, torch.bfloat16: binding.BFLOAT16, torch.int8: binding.INT8}


def unpacked(packed: PackedMatrix) -> Tensor:
    """[N rounded up, K rounded up], by the layout that linear.h states: [block][word][lane][element of a word]."""
    blocks, words, lanes, per_word = packed.data.shape
    found = torch.empty(blocks * lanes, words * per_word, dtype=packed.data.dtype)
    for block in range(blocks):
        for lane in range(lanes):
            found[block * lanes + lane] = packed.data[block, :, lane].flatten()
    return found


# ── packing ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_what_is_packed_unpacks_to_itself_in_whole_registers_and_tiles(library, noise, n, k, dtype):
    weight = (40 * noise(n, k)).clamp(-127, 127).to(dtype)
    packed = pack(weight, library.calls)
    found = unpacked(packed)
    assert torch.equal(found[:n, :k], weight)
    assert not found[n:].any()
    assert not found[:, k:].any()
    lanes, per_word = library.calls.hnet_lanes(), 4 // dtype.itemsize
    words = library.calls.hnet_word_multiple(KINDS[dtype])
    assert found.shape[0] - n < lanes
    assert found.shape[1] - k < per_word * words
    assert found.shape[1] % (per_word * words) == 0
    assert packed.data.is_contiguous()
    assert packed.struct().kind == KINDS[dtype]


def test_only_tiles_need_words_in_sixteens(library):
    expected = 16 if library.isa == "amx" else 1
    multiples = [library.calls.hnet_word_multiple(kind) for kind in (binding.FLOAT32, binding.BFLOAT16, binding.INT8)]
    assert multiples == [1, expected, expected]


# ── 8-bit weights ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_each_output_has_its_own_scale_and_is_off_by_half_a_step_at_most(library, noise, n, k, dtype):
    weight = (noise(n, k) * torch.logspace(-4, 4, n).unsqueeze(1)).to(dtype)
    packed = quantize(weight, library.calls)
    numbers = unpacked(packed)[:n, :k]
    assert packed.scale is not None
    assert packed.sums is not None
    assert torch.equal(packed.scale, weight.float().abs().amax(1) / 127.0)
    assert torch.equal(packed.sums.long(), numbers.long().sum(1))
    assert (numbers.abs().amax(1) == 127).all()
    error = (weight.float() - packed.scale.unsqueeze(1) * numbers.float()).abs()
    assert (error <= 0.5001 * packed.scale.unsqueeze(1)).all()


def test_weights_too_small_for_a_scale_are_zeros(library):
    weight = torch.zeros(5, 9)
    weight[2] = 1e-42
    packed = quantize(weight, library.calls)
    assert packed.scale is not None
    assert packed.scale.isfinite().all()
    assert not unpacked(packed)[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "int8", "int8_bfloat16"])
@pytest.mark.parametrize("name", ["demo", "b_2stage", "tied_embeddings"])
def test_blocks_alone_are_quantised_and_the_residual_alone_stays_wide(case_named, native_of, name, numbers):
    config, weights = case_named(name)
    model = native_of(config, weights, numbers)
    own = torch.bfloat16 if numbers.endswith("bfloat16") else torch.float32
    seen = set()
    for key, weight in weights.items():
        if weight.dim() != 2 or key == "embeddings.weight":  # embeddings are looked up; the head is lm_head.weight
            continue
        in_block = ".mixer." in key or ".mlp." in key
        quantised = in_block and numbers.startswith("int8")
        expected = torch.int8 if quantised else torch.float32 if ".residual_proj." in key else own
        assert model.packed[key].dtype == expected, key
        assert (f"{key}:scale" in model.packed) == quantised
        seen.add((in_block, expected))
    assert model.packed["lm_head.weight"].dtype == own
    assert len(seen) >= 2


# ── what it costs ─────────────────────────────────────────────────────────────────────────────

ENGLISH = """\
The harbour lay quiet that morning, and the fishing boats leaned against the stone wall as if they were still
asleep. An old woman walked slowly along the quay with a basket of bread on her arm. She had baked it before sunrise,
as she had done every day for forty years, and she knew exactly who would buy each loaf. The baker's boy from the upper
town always said that his own bread was better, but nobody who lived near the water believed him.

"Good morning," said the captain of the largest boat. "Will it rain today?"

"It will rain when you are far enough from home to regret it," she answered, and she gave him the smallest loaf because
he had not paid for the last one. He laughed, and he put two coins on the wall. Then he called his crew together, three
brothers and a cousin who was afraid of the sea, and told them to make the ropes ready.

They sailed before eight. For an hour the wind was kind, and the land behind them became a thin grey line. Then the
clouds came from the west, low and dark, and the cousin began to count the waves aloud. He had reached one hundred and
twelve when the first drops fell. "She was right," said the captain. "She is always right, and I never remember it until
I am wet."

In the evening the woman stood at the end of the quay with a lamp. She could not see the boats, but she could hear them:
the slap of the sails, a voice that sang badly, another that told it to stop. One after another they came in between the
two towers, low in the water and heavy with fish. She counted seven, and then she waited, because there should have been
eight. When the last one came at last, its mast was broken and its lantern was out, but there were five men in it, and
the smallest was still counting. "Three thousand and six," he said, and he would not leave the boat before somebody had
written the number down. They wrote it on the wall with a piece of chalk, and there it stayed until the next rain. She
blew out her lamp and went home to prepare the dough for the next day.
"""
TEXT = b"\xfe" + ENGLISH.encode()


def bits_per_byte(logits: Tensor) -> float:
    exact = torch.log_softmax(logits[:-1].double(), -1)
    return -float(exact.gather(1, torch.tensor(list(TEXT[1:])).unsqueeze(1)).mean()) / math.log(2)


# 0.00001 and 0.0015 bits and no flip in 2,014 bytes are seen.
# (numbers, most that bits per byte may differ from float32's, most boundary flips per 10,000 bytes)
COSTS = [("bfloat16", 0.001, 10), ("int8", 0.005, 30), ("int8_bfloat16", 0.005, 30)]


@pytest.mark.parametrize(("numbers", "most_bits", "most_flips"), COSTS)
def test_fewer_bits_cost_little_of_what_the_demo_model_knows(
    case_named, native_of, rows_of, numbers, most_bits, most_flips
):
    assert 1900 <= len(TEXT) <= 2300
    config, weights = case_named("demo")
    heard = {
        kind: rows_of(native_of(config, weights, kind), num_rows=2, max_positions=2304).run(1, TEXT)
        for kind in ("float32", numbers)
    }
    wide, narrow = heard["float32"], heard[numbers]
    assert 1.0 < bits_per_byte(wide.logits) < 3.0  # it is a text that the model can read
    assert abs(bits_per_byte(narrow.logits) - bits_per_byte(wide.logits)) <= most_bits
    flips = int((narrow.boundaries(0) != wide.boundaries(0)).sum())
    assert flips * 10_000 <= most_flips * len(TEXT)
    assert not torch.equal(narrow.logits, wide.logits)  # or the numbers were never narrowed
