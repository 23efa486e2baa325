"""A lexicon of slang: its entries, those of one initial letter a document."""

import itertools
import re
from collections.abc import Iterator

from training.corpora.document import Document
from training.corpora.prose import normalized, page, paragraphs

ENTRY = re.compile(r"^ {3}:([^:\n]+): *(.*)$", re.MULTILINE)
CROSS_REFERENCE = re.compile(r"\{([^{}]+)\}")
NAVIGATION = re.compile(r"^[ \t]*(?:═+|─+|Prev\b.*|Next\b.*|Up\b.*|Home\b.*|Node:.*|\[\[.*\]\])[ \t]*$", re.MULTILINE)
# A letter on a line of its own begins a list of that letter's entries; the appendices come after the last entry.
AFTER_ENTRIES = re.compile(r"^ +(?:[A-Z]|Part III\..*)$", re.MULTILINE)


def lexicon(content: str, title: str) -> Iterator[Document]:
    """The entries, grouped by their first letters: head word and explanation, without pronunciations and marks."""
    text = NAVIGATION.sub("", normalized(content))
    heads = list(ENTRY.finditer(text))
    entries = []
    for head, following in itertools.zip_longest(heads, heads[1:]):
        body = text[head.end() : following.start() if following else len(text)]
        if last := AFTER_ENTRIES.search(body):
            body = body[: last.start()]
        word = " ".join(head[1].split())
        explanation = [CROSS_REFERENCE.sub(r"\1", paragraph) for paragraph in paragraphs(body)]
        if explanation:
            entries.append((word, page([f"{word}: {explanation[0]}", *explanation[1:]])))
    for _, group in itertools.groupby(entries, key=lambda entry: _initial(entry[0])):
        yield Document(title, page([text for _, text in group]))


def _initial(word: str) -> str:
    return word[0].casefold() if word[0].isalpha() else "0"
