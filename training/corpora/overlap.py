"""Documents that were taken already, in this edition or another, are recognized by the runs of words they share."""

import re
import zlib

from training.corpora.document import Document

WORDS = 8
ONE_IN = 8  # runs are sampled by their first word, the same way in every document
TOO_MUCH = 0.3  # of a document's sampled runs
WORD = re.compile(r"\w+")


class Overlap:
    """What has been taken, as the checksums of sampled runs of eight words, without case and punctuation."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, document: Document) -> bool:
        """Whether the document is new: at most 30 % of its sampled runs were seen before; if so, it is taken."""
        runs = self._runs(document.text)
        if runs and len(runs & self._taken) > TOO_MUCH * len(runs):
            return False
        self._taken |= runs
        return True

    @staticmethod
    def _runs(text: str) -> set[int]:
        words = [word.encode() for word in WORD.findall(text.casefold())]
        sampled = {word: zlib.crc32(word) % ONE_IN == 0 for word in set(words)}
        return {
            zlib.crc32(b" ".join(words[start : start + WORDS]))
            for start in range(max(len(words) - WORDS + 1, min(len(words), 1)))
            if sampled[words[start]]
        }
