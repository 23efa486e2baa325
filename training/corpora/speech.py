"""Speeches, one a file: the year and the speaker in the file's name, the text in one long line."""

import html
import re
from pathlib import PurePosixPath

from training.corpora.document import Document
from training.corpora.prose import normalized

AUDIENCE = re.compile(r"\s*[\[(](?:(?:Applause|Laughter)[.!]?|p\.\d+)[\])]", re.IGNORECASE)


def speech(member: str, content: bytes) -> Document:
    """The speech in a file named like `1862_abraham_lincoln_r.txt`.

    The audience's reactions and the numbers of pages are left out.
    """
    year, *name = PurePosixPath(member).stem.split("_")
    speaker = " ".join(part.capitalize() for part in name[:-1])
    text = normalized(html.unescape(content.decode()))
    text = re.sub(r"[ \t]+", " ", AUDIENCE.sub("", text)).strip()
    return Document(f"State of the Union, {year}, {speaker}", text)
