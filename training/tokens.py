"""A text as tokens of a byte-pair encoding that was learned from it, for the baseline that H-Nets do without.

Knows files of documents and the `tokenizers` library, which the extra `train` brings. Special tokens are BOS and EOS
alone, the last two ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.windows import Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LEARNED_FROM = 10_000_000  # bytes of the training text; merges hardly change with more


def texts_of_tokens(train: Path, heldout: Path, vocabulary: int, folder: Path) -> tuple[Text, Text]:
    """Both texts as ids of an encoding of `vocabulary` tokens, made once and kept in `folder`.

    A text that is too short for so many gives fewer. Raises ModuleNotFoundError without `tokenizers`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(train, vocabulary, tokenizer_file(folder, vocabulary))
    lengths = _lengths(tokenizer, vocabulary)
    return (
        _text(train, tokenizer, vocabulary, lengths, folder / f"train-{vocabulary}.npy"),
        _text(heldout, tokenizer, vocabulary, lengths, folder / f"heldout-{vocabulary}.npy"),
    )


def tokenizer_file(folder: Path, vocabulary: int) -> Path:
    """Where an encoding is kept."""
    return folder / f"tokenizer-{vocabulary}.json"


def _tokenizer(train: Path, vocabulary: int, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_documents(train.read_bytes()[:_LEARNED_FROM]), trainer)
    tokenizer.save(str(path))
    return tokenizer


def _lengths(tokenizer: Tokenizer, vocabulary: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes of each token. EOS counts as one, as it does among bytes; BOS is never asked for."""
    lengths = np.ones(vocabulary, dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)  # the byte-level alphabet has a character for each byte
    lengths[vocabulary - 2] = 0
    return lengths


def _text(
    source: Path, tokenizer: Tokenizer, vocabulary: int, lengths: np.ndarray[tuple[int], np.dtype[np.int64]], kept: Path
) -> Text:
    bos, eos = vocabulary - 2, vocabulary - 1
    if not kept.exists():
        encoded = tokenizer.encode_batch(list(_documents(source.read_bytes())))
        parts = [np.array([bos, *each.ids, eos], dtype=np.uint16) for each in encoded]
        with kept.with_suffix(".partial").open("wb") as file:
            np.save(file, np.concatenate(parts))
        kept.with_suffix(".partial").replace(kept)
    return Text(str(source), np.load(kept, mmap_mode="r"), bos, lengths)


def _documents(data: bytes) -> Iterator[str]:
    for document in data.split(b"\xfe")[1:]:
        yield document.rstrip(b"\xff").decode(errors="ignore")
