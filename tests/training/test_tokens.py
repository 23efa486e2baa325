"""The baseline on tokens: every byte of a text is in one token, and bits are counted per byte."""

from __future__ import annotations

import math

import pytest
import torch

from training.journal import read
from training.losses import losses
from training.run import train
from training.settings import Chunking, SettingsError, load
from training.tokens import texts_of_tokens
from training.windows import IGNORED, Windows


def test_tokens_stand_for_every_byte_of_the_text(make_settings, tmp_path) -> None:
    make_settings()
    text, heldout = texts_of_tokens(tmp_path / "train.bin", tmp_path / "heldout.bin", 320, tmp_path / "tokens")
    for each, name in ((text, "train.bin"), (heldout, "heldout.bin")):
        data = (tmp_path / name).read_bytes()
        assert each.lengths[each.symbols].sum() == len(data) - data.count(b"\xfe")
        assert (each.symbols == each.bos).sum() == data.count(b"\xfe")
        assert each.symbols.max() < 320
    assert len(text.symbols) < (tmp_path / "train.bin").stat().st_size / 2
    again, _ = texts_of_tokens(tmp_path / "train.bin", tmp_path / "heldout.bin", 320, tmp_path / "tokens")
    assert (again.symbols == text.symbols).all()
    fewer, _ = texts_of_tokens(tmp_path / "train.bin", tmp_path / "heldout.bin", 300, tmp_path / "tokens")
    assert len(fewer.symbols) > len(text.symbols)
    assert fewer.bos == 298


def test_bits_are_per_byte_of_the_tokens_asked_for() -> None:
    from training.forward import Forwarded

    targets = torch.tensor([[0, 1, IGNORED, 2]])
    logits = torch.zeros(1, 4, 8)
    found = losses(Forwarded(logits, ()), targets, targets, Chunking(), 0, torch.tensor([1, 2, 5, 0, 0, 0, 0, 0]))
    assert found.bits_per_byte == pytest.approx(3 * math.log2(8) / 8)


def test_a_transformer_on_tokens_is_trained_like_the_others(make_settings, tmp_path) -> None:
    settings = make_settings(
        layout='["T2"]', widths=[64], mlp=[128], heads=[2], rotary=[16], windows=[-1], multipliers=[1.0], ratio=[]
    )
    settings.write_text("vocabulary = 320\n" + settings.read_text(), encoding="utf-8")
    assert train(settings, tmp_path / "run", until=12_000)
    evaluation = [line for line in read(tmp_path / "run") if line["kind"] == "evaluation"][-1]
    assert 0 < evaluation["bits_per_byte"] < 4
    assert not (tmp_path / "run" / "export").exists()
    steps = [line for line in read(tmp_path / "run") if line["kind"] == "step"]
    text, _ = texts_of_tokens(tmp_path / "train.bin", tmp_path / "heldout.bin", 320, tmp_path / "run" / "tokens")
    windows = Windows(text, 64, seed=7)
    assert steps[-1]["seen"] == windows.bytes_of(0, 4 * steps[-1]["step"])


def test_tokens_are_for_models_without_stages(make_settings) -> None:
    path = make_settings()
    path.write_text("vocabulary = 320\n" + path.read_text(), encoding="utf-8")
    with pytest.raises(SettingsError, match="vocabulary: only a model without routed stages is trained on tokens"):
        load(path)
