"""Chapters out of a book in plain text, as volunteers of the public domain type it."""

import re

from training.corpora.document import Document
from training.corpora.errors import CorpusError
from training.corpora.prose import normalized, page, paragraphs
from training.corpora.source import Book

SHORTEST_CHAPTER = 400  # characters; shorter ones are lines of a table of contents
BRACKETED = re.compile(
    r"\[(?:Illustration|Footnote|Transcriber|Sidenote|Greek|End volume)[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]"
)
REFERENCE = re.compile(r"\[(?:\d+|[A-Z]|\*)\]|(?<=[\w.,;:!?\"'])\*+(?!\w)")
EMPHASIS = re.compile(r"(?<![\w_])_([^_\n]+(?:\n[^_\n]+)*)_(?![\w_])")
BOLD = re.compile(r"(?<![=\w])=([^=\n]+(?:\n[^=\n]+)*)=(?![=\w])")
DIVISION = re.compile(
    r"(?:BOOK|PART|VOLUME|Volume) [A-Z][A-Za-z]*\b.{0,60}|(?:FIRST|SECOND) EPILOGUE.{0,30}|THE END|FINIS|Finis"
)
DROPPED = re.compile(r"^\*|Project Gutenberg|SMALL PRINT|End of (?:the|this) Project|Produced by ")


def chapters(book: Book, text: str) -> list[Document]:
    """The book's chapters.

    What stands before the first heading (title pages, contents, prefaces) is dropped, and so are notes, references
    to them, pictures' captions, marks of emphasis, divisions' labels and every paragraph of licence boilerplate.
    Raises CorpusError when the book's first or last line is not found, or no heading is.
    """
    text = _extract(book, normalized(text))
    text = BOLD.sub(r"\1", EMPHASIS.sub(r"\1", REFERENCE.sub("", BRACKETED.sub("", text))))
    heading = re.compile(book.heading)
    parts: list[list[str]] = []
    lines = text.split("\n")
    cut = False
    for number, line in enumerate(lines):
        stripped = line.strip()
        match = heading.fullmatch(stripped)
        if match and (number == 0 or not lines[number - 1].strip()):
            title = match.groupdict().get("title")
            parts.append([title or "", ""])
            cut = False
        elif book.back_matter and stripped == book.back_matter:
            cut = True
        elif parts and not cut and not DIVISION.fullmatch(stripped):
            parts[-1].append(line)
    if not parts:
        raise CorpusError(f"{book.title}: no line of {book.member} begins a chapter")
    documents = []
    for part in parts:
        found = [paragraph for paragraph in paragraphs("\n".join(part)) if not DROPPED.search(paragraph)]
        if sum(map(len, found)) >= SHORTEST_CHAPTER:
            documents.append(Document(book.title, page(found)))
    return documents


def _extract(book: Book, text: str) -> str:
    for border, what in ((book.begin, "first"), (book.end, "last")):
        if not border:
            continue
        found = re.search(rf"^[ \t]*{re.escape(border)}[ \t]*$", text, re.MULTILINE)
        if found is None:
            raise CorpusError(f"{book.title}: its {what} line, {border!r}, is not in {book.member}")
        text = text[found.end() :] if what == "first" else text[: found.start()]
    return text
