"""The tokenizer folder that tools of others are given: what the script writes, and the bytes of any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.byte_tokenizer import BOS, EOS, FOLDER, documents, symbols, write

TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_committed_files_are_what_the_script_writes(tmp_path):
    write(tmp_path)
    for name in documents():
        assert (FOLDER / name).read_bytes() == (tmp_path / name).read_bytes()


@given(st.text())
def test_ids_are_the_bytes_of_any_text(text):
    data = list(text.encode())
    assert TOKENIZER.encode(text, add_special_tokens=False).ids == data
    assert TOKENIZER.encode(text).ids == [BOS, *data]
    assert TOKENIZER.decode(data) == text


@pytest.mark.parametrize("text", ["<|bos|>", "a<|eos|>b", "þÿ", " a  b\r\n\x00", ""])
def test_nothing_in_a_text_is_a_special_token(text):
    assert TOKENIZER.encode(text, add_special_tokens=False).ids == list(text.encode())


def test_every_byte_has_an_id_of_its_own():
    assert sorted(symbols().values()) == sorted(TOKENIZER.get_vocab().values()) == list(range(256))


def test_transformers_loads_it():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(FOLDER))
    text = "a<|bos|>þÿ你"
    assert tokenizer.encode(text) == [BOS, *text.encode()]
    assert tokenizer.decode([*text.encode()]) == text
    assert tokenizer.all_special_ids == [BOS, EOS]
