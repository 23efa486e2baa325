"""A document: the unit that a model is trained on."""

from collections.abc import Iterable
from dataclasses import dataclass

BEGINNING = b"\xfe"
END = b"\xff"


@dataclass(frozen=True, slots=True)
class Document:
    """A chapter, a speech, a page or a source file, with the title of the whole book that it is part of."""

    title: str
    text: str

    def framed(self) -> bytes:
        """The UTF-8 bytes between the bytes 0xFE and 0xFF, which never occur in UTF-8."""
        return BEGINNING + self.text.encode() + END


def framed(documents: Iterable[Document]) -> bytes:
    """All documents, each framed, one after the other."""
    return b"".join(document.framed() for document in documents)
