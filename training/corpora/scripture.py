"""Books out of a SWORD module: its `zText` driver keeps each book as a block of OSIS markup, packed by zlib."""

import html
import re
import struct
import zlib
from collections.abc import Iterator

from training.corpora.document import Document
from training.corpora.errors import CorpusError
from training.corpora.prose import normalized

BLOCK = struct.Struct("<III")  # where the block begins, its packed and its unpacked length in bytes
BOOK = re.compile(r'<div\b[^>]*type="book"[^>]*/>')
TITLE = re.compile(r'<milestone n="([^"]+)" type="x-usfm-h"/>')
DROPPED = re.compile(r"<(note|title|reference|figure)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
# What notes, ends of lines and ends of paragraphs leave behind until the spaces around them are seen to.
NOTE, LINE_BREAK, PARAGRAPH_BREAK = "\x00", "\x01", "\x02"
LINE = re.compile(r"<l\b[^>]*>|</l>|<lb\b[^>]*/>")
PARAGRAPH = re.compile(r'<div\b[^>]*type="x-p[^"]*"[^>]*/>|</?lg\b[^>]*>|<chapter\b[^>]*/>|<p\b[^>]*/?>|</p>')
TAG = re.compile(r"<[^>]*>")


def scripture(index: bytes, blocks: bytes, label: str) -> Iterator[Document]:
    """The books whose blocks the index (`.bzs`) lists, a document each; `label` comes before the book's title.

    Headings, footnotes and verse numbers are left out. Raises CorpusError when a block cannot be unpacked.
    """
    for position in range(0, len(index) - BLOCK.size + 1, BLOCK.size):
        start, packed, unpacked = BLOCK.unpack_from(index, position)
        if packed == 0:
            continue
        try:
            markup = zlib.decompress(blocks[start : start + packed])
        except zlib.error:
            raise CorpusError(f"{label}: block {position // BLOCK.size} of the module cannot be unpacked") from None
        if len(markup) != unpacked:
            raise CorpusError(f"{label}: block {position // BLOCK.size} of the module has a wrong length")
        source = markup.decode()
        if book := BOOK.search(source):  # a preface may come before the first one
            source = source[book.start() :]
        title = TITLE.search(source)
        text = plain(source)
        if title is not None and text:
            yield Document(f"{label}: {title[1]}", text)


def plain(markup: str) -> str:
    """The text of OSIS markup: a paragraph's words on one line, lines of poetry on lines of their own."""
    text = re.sub(r"\s+", " ", DROPPED.sub(NOTE, markup))
    text = html.unescape(TAG.sub("", LINE.sub(LINE_BREAK, PARAGRAPH.sub(PARAGRAPH_BREAK, text))))
    text = re.sub(r"(?<=[^\s\x00-\x02])\x00+(?=\w)", " ", text).replace(NOTE, "")
    text = re.sub(r"[ \x01]*\x02[ \x01\x02]*", "\n\n", text)
    text = re.sub(r" *\x01[ \x01]*", "\n", text)
    # A verse that ends in a quotation mark lacks the space after it.
    text = re.sub(r"([\w.,!?;:][\"']+)(?=[A-Z])", r"\1 ", normalized(text))
    return re.sub(r" {2,}", " ", text).strip()
