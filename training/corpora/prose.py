"""Plain prose out of hard-wrapped text: paragraphs of one line each, plain quotation marks, no tables."""

import re
import unicodedata

# The text that other sources of fiction come with has plain quotation marks and double hyphens: one convention for
# all of them is one thing less for a small model to learn.
PLAIN = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "‚": "'",
        "“": '"',
        "”": '"',
        "„": '"',
        "–": "-",
        "‑": "-",
        "—": "--",
        "―": "--",
        "…": "...",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u00ad": "",
        "\u200b": "",
        "\u2060": "",
        "\ufeff": "",
    }
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
TABLE_LINE = re.compile(r"\S {3,}\S.*\S {3,}\S|\.{4,}|\|.*\||[-=_]{5,}|(?:\. ){4,}|\S {4,}[\d,.]+$")
ORNAMENT = re.compile(r"[\s*·•#~.\-_=+]+")
VERSE_WIDTH = 55
VERSE_LINES = 2
CAPITALS = 0.7  # at least this part of a verse's lines begins with a capital letter


def normalized(text: str) -> str:
    """Unicode's NFC, newlines only as line ends, plain quotation marks and dashes, no control characters but tabs."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return CONTROL.sub("", text.translate(PLAIN))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of hard-wrapped text, which empty lines part.

    Lines of prose are joined by spaces (without one after a hyphen or a dash, which belong to the words around them);
    lines of verse stay lines. Tables, rows of ornaments and empty paragraphs are dropped.
    """
    found = []
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line.rstrip() for line in block.expandtabs().split("\n") if line.strip()]
        if not lines or ORNAMENT.fullmatch(" ".join(lines)) or _is_table(lines):
            continue
        found.append(_verse(lines) if _is_verse(lines) else _joined(lines))
    return found


def page(parts: list[str]) -> str:
    """Paragraphs as a document's text: an empty line between each two."""
    return "\n\n".join(parts)


def _joined(lines: list[str]) -> str:
    text = ""
    for line in lines:
        line = line.strip()
        between = "" if not text or (text[-1] == "-" and text[-2:-1] != " ") else " "
        text += between + line
    return re.sub(r" {2,}", " ", text)


def _verse(lines: list[str]) -> str:
    return "\n".join(re.sub(r" {2,}", " ", line.strip()) for line in lines)


def _is_verse(lines: list[str]) -> bool:
    # A wrapped paragraph fills its lines, all but the last, and sentences rarely begin where lines do.
    if len(lines) < VERSE_LINES:
        return False
    capitals = sum(line.lstrip(" \"'([-")[:1].isupper() for line in lines)
    return max(len(line.strip()) for line in lines[:-1]) < VERSE_WIDTH and capitals >= CAPITALS * len(lines)


def _is_table(lines: list[str]) -> bool:
    if any("\u2500" <= character <= "\u257f" for line in lines for character in line):  # drawn with boxes' lines
        return True
    rows = sum(bool(TABLE_LINE.search(line.strip())) for line in lines)
    return rows * 2 > len(lines)
