"""Source code: modules of Python, and a program in C that its authors keep as one file of many."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from training.corpora.document import Document
from training.corpora.errors import CorpusError

SHORTEST = 200  # bytes; shorter modules are only imports or a docstring
LONGEST = 300_000  # bytes; longer ones are tables that a program wrote
LETTERS = 0.45  # at least this part of a module's visible characters: others are tables of numbers
# A file that includes another goes on after it: each stretch of it is a document.
BEGIN = re.compile(r"^/\*+ (?:Begin file|Continuing where we left off in) (\S+) \*+/$", re.MULTILINE)
END = re.compile(r"^/\*+ (?:End of \S+|Include \S+ in the middle of \S+) \*+/$", re.MULTILINE)
GENERATED = "automatically generated"


def module(member: str, content: bytes, label: str, root: str) -> Document | None:
    """A module of Python, part of its top-level package or module below `root`; None when it is no text to learn from.

    Tables, empty modules and files in other encodings than UTF-8 are left out. Indentation is kept as it is.
    """
    try:
        text = content.decode().replace("\r\n", "\n").strip("\n") + "\n"
    except UnicodeDecodeError:
        return None
    visible = [character for character in text if not character.isspace()]
    letters = sum(character.isalpha() for character in visible)
    if not SHORTEST <= len(text) <= LONGEST or letters < LETTERS * len(visible) or "\0" in text:
        return None
    top = PurePosixPath(member.removeprefix(root).lstrip("/")).parts[0].removesuffix(".py")
    return Document(f"{label} {top}", text)


def amalgamation(text: str, title: str) -> Iterator[Document]:
    """The files that were put together into one, a document each; what lies between them is left out.

    Files that a program wrote, as their first lines say, are left out too.

    Raises CorpusError when the text has no marks of where files begin.
    """
    begins = list(BEGIN.finditer(text))
    if not begins:
        raise CorpusError(f"{title}: the file has no marks of where its parts begin")
    for begin, following in zip(begins, [*begins[1:], None], strict=True):
        part = text[begin.end() : following.start() if following else len(text)]
        end = END.search(part)
        part = part[: end.start() if end else len(part)].strip("\n")
        if len(part) >= SHORTEST and GENERATED not in part[:SHORTEST]:
            yield Document(title, part + "\n")
