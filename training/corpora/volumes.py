"""Whole books in a text of many: where each begins, found by its first words."""

import lzma
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from training.corpora.document import Document
from training.corpora.errors import CorpusError

# The first words of a volume's first chapter, as far as they tell it from any other.
OPENINGS = {
    "The Mysterious Affair at Styles": "I Go to Styles\n\nThe intense interest aroused in the public",
    "Short Fiction (Chekhov)": '"Who goes there?"\n\nNo answer. The watchman sees nothing',
    "Sherlock Holmes": '"My dear fellow," said Sherlock Holmes as we sat on either side of the fire',
    "David Copperfield": "I Am Born\n\nWhether I shall turn out to be the hero",
    "Great Expectations": "My father's family name being Pirrip",
    "The Secret Garden": "There Is No One Left\n\nWhen Mary Lennox was sent",
    "Short Fiction (Wells)": "The little shop was not paying.",
    "Emma": "Emma Woodhouse, handsome, clever, and rich",
    "Pride and Prejudice": "It is a truth universally acknowledged",
    "Three Men in a Boat": "Three invalids--Sufferings of George and Harris",
    "The Wind in the Willows": "The River Bank\n\nThe Mole had been working",
    "Ozma of Oz": "The Girl in the Chicken-Coop\n\n",
    "The Marvelous Land of Oz": "In the Country of the Gillikins",
    "The Wonderful Wizard of Oz": "The Cyclone\n\nDorothy lived in the midst",
    "Anne of Green Gables": "Mrs. Rachel Lynde Is Surprised\n\n",
    "Alice's Adventures in Wonderland": "Down the Rabbit-Hole\n\n",
    "Little Women": "Playing Pilgrims\n\n",
    "Adventures of Huckleberry Finn": "You don't know about me without you have read",
    "The Adventures of Tom Sawyer": "Tom Plays, Fights, and Hides\n\n",
    "Right Ho, Jeeves": '"Jeeves," I said, "may I speak frankly?"',
    "Short Fiction (Wodehouse)": "Mr. Meggs's mind was made up.",
    "Treasure Island": "At the Admiral Benbow\n\n",
    "The Jungle Book": "You can work it out by Fractions or by simple Rule of Three",
}


def read_extra(path: Path) -> list[Document]:
    """The documents of a `.txt` or `.txt.xz` file in UTF-8, which NUL bytes part, in their order.

    A document with a known opening begins that volume; those before the first are part of a book named as the file.
    Raises CorpusError when the file cannot be read.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        parts = content.decode().split("\0")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from None
    return with_titles([text for part in parts if (text := part.strip())], path.name.split(".")[0])


def with_titles(texts: Sequence[str], first: str) -> list[Document]:
    """The texts as documents of the volumes that their openings tell; `first` is the title before any opening."""
    title = first
    documents = []
    for text in texts:
        text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
        title = next((known for known, opening in OPENINGS.items() if text.startswith(opening)), title)
        documents.append(Document(title, text))
    return documents
