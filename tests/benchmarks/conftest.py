from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.models import read_weights

TINY = {
    "arch_layout": ["m1", ["T1m1", ["T2"], "m1"], "m1"],
    "d_model": [64, 64, 128],
    "d_intermediate": [0, 128, 128],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 32, "expand": 2},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [16, 16, 16], "window_size": [7, 7, -1]},
    "tie_embeddings": False,
}


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A two-stage model of random weights, by the name that every command takes."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return f"random:{path}"


@pytest.fixture
def tiny(tiny_model: str):
    """(configuration, float32 weights)."""
    return read_weights(tiny_model, "float32")
