"""Small runs for the trainer's tests: a text of documents, and settings of a model that learns it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SENTENCE = "the keeper of a light counted ships at dusk and wrote their names in his book before the tide turned"
WORDS = SENTENCE.split()

SETTINGS = """
name = "tiny"
seed = 7
[model]
arch_layout = {layout}
d_model = {widths}
d_intermediate = {mlp}
vocab_size = 256
tie_embeddings = false
ssm_cfg = {{ chunk_size = 256, d_conv = 4, d_state = 8, expand = 2 }}
attn_cfg = {{ num_heads = {heads}, rotary_emb_dim = {rotary}, window_size = {windows} }}
[data]
train = "train.bin"
heldout = "heldout.bin"
window = 64
[batch]
windows = 4
micro = {micro}
processes = {processes}
[optimizer]
learning_rate = 3e-3
multipliers = {multipliers}
[schedule]
total = {total}
warmup = 1024
decay = 1024
[chunking]
ratio = {ratio}
[reporting]
evaluate = {evaluate}
evaluation_windows = 4
checkpoint = {checkpoint}
"""


def documents(count: int, seed: int) -> bytes:
    """`count` documents of sentences, framed as the trainer reads them."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, size=random.integers(20, 60))) + "." for _ in range(count)]
    return b"".join(b"\xfe" + text.encode() + b"\xff" for text in texts)


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Path]:
    """Writes data and settings into a folder of the test's own; any setting of `SETTINGS` by name."""

    def make(**changes: object) -> Path:
        (tmp_path / "train.bin").write_bytes(documents(40, 1))
        (tmp_path / "heldout.bin").write_bytes(documents(8, 2))
        values: dict[str, object] = {
            "layout": '["m1", ["T1"], "m1"]',
            "widths": [64, 64],
            "mlp": [0, 128],
            "heads": [2, 2],
            "rotary": [16, 16],
            "windows": [31, -1],
            "micro": 2,
            "processes": 1,
            "multipliers": [1.0, 0.25],
            "total": 256 * 16,
            "ratio": [4.0],
            "evaluate": 256 * 8,
            "checkpoint": 1e-9,
        } | changes
        path = tmp_path / "settings.toml"
        path.write_text(SETTINGS.format(**values), encoding="utf-8")
        return path

    return make


@pytest.fixture
def make_documents() -> Callable[[int, int], bytes]:
    """`documents(count, seed)`."""
    return documents
