"""What models are compared by: compute for a byte, and text made harder."""

from __future__ import annotations

import pytest

from hnet_runtime.config import ModelConfig
from training.compute import multiplications_per_byte
from training.perturb import KINDS, perturbed

SSM = {"d_conv": 4, "d_state": 16, "expand": 2}


def config_of(layout, widths, mlp) -> ModelConfig:
    count = len(widths)
    attention = {"num_heads": [2] * count, "rotary_emb_dim": [16] * count, "window_size": [-1] * count}
    return ModelConfig.from_dict(
        {"arch_layout": layout, "d_model": widths, "d_intermediate": mlp, "ssm_cfg": SSM, "attn_cfg": attention}
    )


def test_a_transformers_multiplications_are_its_weights_and_its_scores() -> None:
    config = config_of(["T2"], [64], [128])
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    scores = 2 * 2 * 64 * 100 / 2  # layers, scores and sums, width, keys seen on average
    assert multiplications_per_byte(config, [], 100) == pytest.approx(weights + scores + 64 * 256)
    tokens = multiplications_per_byte(config, [], 100, vocabulary=1000, bytes_per_symbol=4.0)
    assert tokens == pytest.approx((weights + scores + 64 * 1000) / 4)


def test_an_inner_network_counts_once_a_chunk() -> None:
    config = config_of(["m1", ["T1"], "m1"], [64, 96], [0, 128])
    once = multiplications_per_byte(config, [1.0], 64)
    half = multiplications_per_byte(config, [2.0], 64)
    inner = 4 * 96 * 96 + 3 * 96 * 128
    scores_once, scores_half = 2 * 96 * 64 / 2, 2 * 96 * 32 / 2
    assert once - half == pytest.approx(inner + scores_once - (inner + scores_half) / 2)
    mamba = (2 * 128 + 2 * 16 + 2) * 64 + 128 * 64
    outer = 2 * mamba + 3 * 64 * 64 + 64 * 256  # two layers, router and residual, head
    assert once == pytest.approx(outer + inner + scores_once)


TEXT = (
    b"\xfeThe keeper of the light counted ships at dusk, and wrote their names down.\xff\xfeN\xc3\xa9e 1822!\xff" * 20
)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_documents_stay_documents_and_the_same_every_time(kind: str) -> None:
    changed = perturbed(TEXT, kind)
    assert changed != TEXT
    assert changed == perturbed(TEXT, kind)
    assert (changed.count(b"\xfe"), changed.count(b"\xff")) == (TEXT.count(b"\xfe"), TEXT.count(b"\xff"))
    changed.replace(b"\xfe", b"").replace(b"\xff", b"").decode()


def test_each_kind_changes_what_it_says() -> None:
    assert perturbed(TEXT, "upper").count("NÉE 1822!".encode()) == 20
    ascii_only = TEXT.replace("é".encode(), b"e")
    assert perturbed(ascii_only, "mixed").lower() == ascii_only.lower()
    spaces = perturbed(TEXT, "dropped-spaces").count(b" ") / TEXT.count(b" ")
    assert 0.75 < spaces < 0.95
    assert perturbed(TEXT, "dropped-spaces").replace(b" ", b"") == TEXT.replace(b" ", b"")
    assert abs(len(perturbed(TEXT, "typos")) - len(TEXT)) < 0.05 * len(TEXT)
