"""`hnet segment`: the chunks of a text, for reading and as the HTTP route answers."""

from __future__ import annotations

import json
import re

import pytest

from hnet_runtime import Engine, SamplingParams
from server.cli.segment import model_and_file

TEXT = "The quick brown fox.\nÜber den Hügeln 日本語."


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "model", "name"),
    [
        ((), None, "-"),
        (("-",), None, "-"),
        (("text.txt",), None, "text.txt"),
        (("nowhere.txt",), None, "nowhere.txt"),
        (("model.pt",), "model.pt", "-"),
        (("folder",), "folder", "-"),
        (("demo",), "demo", "-"),
        (("owner/name",), "owner/name", "-"),
        (("folder/text",), None, "folder/text"),
        (("demo", "folder"), "demo", "folder"),
    ],
)
def test_arguments_are_a_model_and_a_file(tmp_path, monkeypatch, arguments, model, name):
    (tmp_path / "folder").mkdir()
    for file in ("text.txt", "model.pt", "folder/text"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    assert model_and_file(arguments) == (model, name)


def test_marks_stand_between_the_chunks_of_each_stage(hnet, golden_case, written):
    path = golden_case("b_2stage").path
    result = hnet("segment", path, written)
    assert result.code == 0
    data = b"\xfe" + TEXT.encode()
    wanted = SamplingParams(max_tokens=0, return_chunks=True, utf8="raw")
    (completion,) = Engine.from_pretrained(path).generate([data], wanted)
    for stage, part in enumerate(re.split(r"^stage \d: .*\n", result.text, flags=re.MULTILINE)[1:], start=1):
        starts = {chunk.start for chunk in completion.chunks if chunk.stage == stage}
        assert part.replace("|", "").strip("\n") == TEXT
        assert f"stage {stage}: {len(starts)} chunks, {len(data) / len(starts):.2f} bytes a chunk" in result.text
        if stage == 1:
            whole_characters = {1 + len(TEXT[:at].encode()) for at in range(1, len(TEXT))}
            assert part.count("|") >= len(starts & whole_characters) > 3


def test_json_gives_offsets_from_bos_on(hnet, golden_case, written):
    case = golden_case("b_2stage")
    document = json.loads(hnet("segment", case.path, written, "--json").text)
    assert document["input_bytes"] == 1 + len(TEXT.encode())
    assert [stage["stage"] for stage in document["stages"]] == [1, 2]
    for stage in document["stages"]:
        assert stage["boundaries"][0] == 0
        assert stage["probabilities"][0] == 1.0
        assert stage["boundaries"] == sorted(set(stage["boundaries"]))
        assert all(0.5 < p <= 1 for p in stage["probabilities"])
        assert stage["bytes_per_chunk"] == document["input_bytes"] / len(stage["boundaries"])
    assert set(document["stages"][1]["boundaries"]) <= set(document["stages"][0]["boundaries"])


def test_any_bytes_can_be_segmented(hnet, tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 2)
    assert json.loads(hnet("segment", path, "--json").text)["input_bytes"] == 513
    assert hnet("segment", path).code == 0


def test_standard_input_is_the_text_without_a_file(hnet, written):
    expected = hnet("segment", written).raw
    assert hnet("segment", stdin=TEXT.encode()).raw == expected
    assert hnet("segment", "-", stdin=TEXT.encode()).raw == expected
    assert hnet("segment", "demo", stdin=TEXT.encode()).raw == expected


def test_empty_text_has_the_chunk_of_bos(hnet):
    (stage,) = json.loads(hnet("segment", "--json").text)["stages"]
    assert (stage["boundaries"], stage["bytes_per_chunk"]) == ([0], 1.0)


def test_model_without_routers_has_nothing_to_show(hnet, golden_case, written):
    path = golden_case("e_iso_T2").path
    assert json.loads(hnet("segment", path, written, "--json").text)["stages"] == []
    result = hnet("segment", path, written)
    assert result.code == 1
    assert "main network alone" in result.errors


def test_json_is_what_the_server_answers(hnet, served, written):
    """The real server in a process of its own, by `hnet serve`."""
    answer = served("/v1/segment", {"input": TEXT})
    assert json.loads(hnet("segment", written, "--json").text) == answer
