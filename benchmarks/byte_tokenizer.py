"""The bytes as a tokenizer folder, for tools that cannot do without one: a token is a byte and its id is its value.

    python -m benchmarks.byte_tokenizer [FOLDER]

Writes loadtests/byte-tokenizer. Bytes 254 and 255 occur in no text; there they are the begin and the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

BOS, EOS = 254, 255
_NAMES = {BOS: "<|bos|>", EOS: "<|eos|>"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FOLDER = Path(__file__).parents[1] / "loadtests" / "byte-tokenizer"


def symbols() -> dict[str, int]:
    """The printable character that stands for a byte in ByteLevel vocabularies, as GPT-2 has it → the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: byte for byte in printable} | {byte: 256 + at for at, byte in enumerate(others)}
    return {chr(stand_ins[byte]): byte for byte in range(256)}


def documents(model_max_length: int = 8192) -> dict[str, object]:
    """Contents of the folder's JSON files by name."""
    bos = {"id": _NAMES[BOS], "ids": [BOS], "tokens": [_NAMES[BOS]]}
    begin, first = {"SpecialToken": {"id": _NAMES[BOS], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    vocabulary = {_NAMES.get(byte, symbol): byte for symbol, byte in symbols().items()}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {_NAMES[BOS]: bos},
        },
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _NAMES[BOS],
        "eos_token": _NAMES[EOS],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that has the name of a special token in it is bytes as any other
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def write(folder: Path) -> None:
    """Writes the files; those that are there are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents().items():
        text = json.dumps(document, indent=1) + "\n"  # other than ASCII is escaped: it reads the same everywhere
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
