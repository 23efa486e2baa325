"""Stop strings over a growing sequence of bytes."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Follows all stop strings at once, one byte at a time (Knuth, Morris and Pratt's automaton for each)."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self.stops = tuple(stops)
        self._fallbacks = [_fallback(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)

    def push(self, byte: int) -> bytes | None:
        """Takes the next byte; returns the stop string that ends with it, the longest if several do."""
        found: bytes | None = None
        for index, stop in enumerate(self.stops):
            matched = self._matched[index]
            while matched and (matched == len(stop) or stop[matched] != byte):
                matched = self._fallbacks[index][matched - 1]
            matched += stop[matched] == byte
            self._matched[index] = matched
            if matched == len(stop) and (found is None or len(stop) > len(found)):
                found = stop
        return found

    def copy(self) -> StopMatcher:
        """Another that stands where this one does."""
        new = StopMatcher.__new__(StopMatcher)
        new.stops, new._fallbacks, new._matched = self.stops, self._fallbacks, list(self._matched)
        return new

    def pass_over(self) -> None:
        """The stop strings that end here are not to count; what of their bytes may begin another is still pending."""
        for index, matched in enumerate(self._matched):
            if matched == len(self.stops[index]):
                self._matched[index] = self._fallbacks[index][matched - 1]

    @property
    def pending(self) -> int:
        """How many of the last bytes may turn out to be the beginning of a stop string."""
        return max(self._matched, default=0)


def _fallback(pattern: bytes) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        length += pattern[index] == pattern[length]
        table[index] = length
    return table
