"""What a source of text is: one file of one package, and how its text is read."""

from dataclasses import dataclass
from enum import StrEnum

CHAPTER = r"(?:CHAPTER|Chapter) (?:[IVXLCDM]+|\d+)\.?(?:\s+(?P<title>\S.*))?"


class Registry(StrEnum):
    """Who hands the package out, and so which client fetches it."""

    APT = "apt"
    NPM = "npm"
    PYPI = "pypi"


class Reader(StrEnum):
    """How the text is found in the package's members."""

    BOOKS = "books"
    AUSTEN = "austen"
    SPEECHES = "speeches"
    SWORD = "sword"
    LEXICON = "lexicon"
    PYTHON = "python"
    AMALGAMATION = "amalgamation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """A book inside a package.

    `member` is its path there. Where one member holds several books, `begin` and `end` are the lines (without the
    spaces around them) between which this one lies; empty means from the start, or to the end. `heading` matches a
    whole line that begins a chapter; its group `title`, if it has one, is kept as the chapter's first line.
    `back_matter` is the line, if any, from which on the rest of each chapter is dropped (lists of further reading).
    """

    title: str
    member: str
    heading: str = CHAPTER
    begin: str = ""
    end: str = ""
    back_matter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A package's file, by its checksum, and what of it is read.

    `file` is the file's name as its registry gives it, `sha256` its checksum in hexadecimal, `bytes` its size.
    `members` are patterns (as of `fnmatch`) of the paths to read, less those that `left_out` matches; a source of
    books needs none. `label` names what the source's documents are part of where the package has no books of its own,
    and `root` is the folder below which a program's parts lie.
    """

    name: str
    registry: Registry
    package: str
    version: str
    file: str
    sha256: str
    bytes: int
    licence: str
    reader: Reader
    label: str = ""
    root: str = ""
    books: tuple[Book, ...] = ()
    members: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def patterns(self) -> tuple[str, ...]:
        """Which members of the package are read."""
        return self.members or tuple(dict.fromkeys(book.member for book in self.books))
