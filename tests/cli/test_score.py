"""`hnet score`: bits per byte, as the HTTP route answers, and of texts longer than a context."""

from __future__ import annotations

import json
import math
import re

import pytest

from hnet_runtime import Engine, SamplingParams
from server.cli.score import pieces

TEXT = "The quick brown fox.\nÜber den Hügeln 日本語."


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def bits(text):
    (number,) = re.findall(r"^([\d.]+) bits per byte over \d+ bytes\n$", text)
    return float(number)


def scored(path, data):
    """The engine's own log-probabilities of all bytes but the first."""
    wanted = SamplingParams(max_tokens=0, prompt_logprobs=0, utf8="raw")
    (completion,) = Engine.from_pretrained(path).generate([data], wanted)
    return [entry.logprob for entry in completion.prompt_logprobs]


def test_the_score_is_the_mean_of_the_engines_own(hnet, golden_case, written):
    path = golden_case("b_2stage").path
    logprobs = scored(path, b"\xfe" + TEXT.encode())
    assert len(logprobs) == len(TEXT.encode())
    result = hnet("score", path, written)
    assert result.code == 0
    assert bits(result.text) == pytest.approx(-sum(logprobs) / math.log(2) / len(logprobs), abs=1e-4)
    assert f"over {len(TEXT.encode())} bytes" in result.text
    document = json.loads(hnet("score", path, written, "--json").text)
    assert document["logprobs"] == [None, *logprobs]
    assert document["usage"]["prompt_tokens"] == document["input_bytes"] == 1 + len(logprobs)


def test_text_that_a_model_knows_takes_fewer_bits(hnet):
    def score(text):
        return bits(hnet("score", stdin=text).text)

    assert score(b"Once upon a time there was a little girl.") < score(b"cnOe upno a tmie rteeh saw a tlitel rgil.")


def test_any_bytes_can_be_scored(hnet, tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    assert json.loads(hnet("score", path, "--json").text)["input_bytes"] == 257


def test_empty_text_has_no_score(hnet):
    document = json.loads(hnet("score", "--json").text)
    assert (document["logprobs"], document["bits_per_byte"]) == ([None], None)
    result = hnet("score")
    assert (result.code, result.raw) == (1, b"")
    assert "the text is empty" in result.errors


def test_long_text_is_scored_piece_by_piece_and_says_so(hnet, golden_case, written):
    path = golden_case("b_2stage").path
    data = TEXT.encode()
    expected = [item for start in range(0, len(data), 20) for item in scored(path, b"\xfe" + data[start : start + 20])]
    result = hnet("score", path, written, "--json", "--max-model-len", "21")
    document = json.loads(result.text)
    assert document["logprobs"] == [None, *expected]
    assert document["usage"]["prompt_tokens"] == len(data) + math.ceil(len(data) / 20)
    assert f"in {math.ceil(len(data) / 20)} pieces of at most 21 bytes, each after BOS" in result.errors
    assert "pieces" not in hnet("score", path, written, "--json", "--max-model-len", len(data) + 1).errors


def test_with_overlap_a_piece_knows_what_was_before(hnet, golden_case, written):
    path = golden_case("b_2stage").path
    data = TEXT.encode()
    expected = scored(path, b"\xfe" + data[:20])
    for start in range(20, len(data), 12):
        expected += scored(path, b"\xfe" + data[start - 8 : start + 12])[8:]
    result = hnet("score", path, written, "--json", "--max-model-len", "21", "--overlap", "8")
    assert json.loads(result.text)["logprobs"] == [None, *expected]
    assert "and the last 8 bytes before it" in result.errors


@pytest.mark.parametrize("length", range(1, 8))
def test_pieces_count_every_byte_once(length):
    for data in (bytes(range(size)) for size in range(20)):
        for overlap in range(length):
            cut = list(pieces(data, length, overlap))
            assert b"".join(piece[known:] for piece, known in cut) == data
            assert all(len(piece) <= length for piece, _ in cut)
            assert all(len(piece) > known for piece, known in cut) or not data
            assert [known for _, known in cut] == [0] + [overlap] * (len(cut) - 1)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.txt"], 1, "nowhere.txt: No such file or directory"),
        (["a", "b", "c"], 2, "takes a MODEL and a FILE"),
        (["--max-model-len", "1"], 2, "--max-model-len"),
        (["--max-model-len", "10", "--overlap", "9"], 2, "leaves no new byte"),
    ],
)
def test_mistakes_are_one_line(hnet, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    result = hnet("score", *arguments)
    assert (result.code, result.raw) == (code, b"")
    assert result.errors.startswith("hnet: error: ")
    assert result.errors.count("\n") == 1
    assert said in result.errors


def test_json_is_what_the_server_answers(hnet, served, written):
    """The real server in a process of its own, by `hnet serve`."""
    answer = served("/v1/score", {"input": TEXT})
    assert json.loads(hnet("score", written, "--json").text) == answer
