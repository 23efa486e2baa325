"""Fixtures of the model's tests beside the shared ones in `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Document = dict[str, Any]


@pytest.fixture
def document() -> Callable[..., Document]:
    """A sound two-stage configuration as official JSON; keyword arguments replace keys, None drops one."""

    def build(**changes: Any) -> Document:
        base: Document = {
            "arch_layout": ["m2", ["T1m1", ["T2"], "m1T1"], "m2"],
            "d_model": [64, 96, 128],
            "d_intermediate": [0, 128, 300],
            "vocab_size": 256,
            "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 32, "expand": 2},
            "attn_cfg": {"num_heads": [4, 4, 4], "rotary_emb_dim": [16, 16, 16], "window_size": [15, 15, -1]},
            "tie_embeddings": False,
        }
        merged = {**base, **changes}
        return {key: value for key, value in merged.items() if value is not None}

    return build
