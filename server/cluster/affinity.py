"""Which replica has read which beginnings of prompts, and so who should read the next one.

Knows bytes, hashes and names of replicas; nothing of Ray, of HTTP or of what a prompt says.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

BLOCK = 64  # bytes; what a prefix cache keeps states at by default
MAX_BLOCKS = 128  # of one prompt; who shares so much shares a replica, whatever comes after it
DEFAULT_CAPACITY = 1 << 17  # beginnings that are remembered, in all replicas together
DEFAULT_SLACK = 8  # requests that a replica may have more than the least busy one and still be preferred


def beginnings(prompt: bytes) -> tuple[int, ...]:
    """A number for each beginning of the prompt of whole blocks, shortest first: equal where all bytes up to there
    are."""
    hasher = hashlib.blake2b(digest_size=8)
    numbers = []
    for end in range(BLOCK, min(len(prompt), MAX_BLOCKS * BLOCK) + 1, BLOCK):
        hasher.update(prompt[end - BLOCK : end])
        numbers.append(int.from_bytes(hasher.copy().digest()))
    return tuple(numbers)


@dataclass(frozen=True)
class Ranking:
    """replicas: all of them, the one to ask first. matched: blocks that the first one has read before. shed: whether
    another one has read more of them, and is too busy."""

    replicas: list[str]
    matched: int
    shed: bool


class PrefixAffinity:
    """Remembers the beginnings that were sent to each replica, the most recent ones.

    What is remembered may have left that replica's cache: a wrong guess costs time, never a wrong byte. `slack`:
    requests that a replica may have more than the least busy one and still be preferred for what it has read.
    """

    def __init__(self, *, slack: int = DEFAULT_SLACK, capacity: int = DEFAULT_CAPACITY) -> None:
        if slack < 0 or capacity < 1:
            raise ValueError(f"slack must be at least 0 and capacity at least 1, not {slack} and {capacity}")
        self._slack, self._capacity = slack, capacity
        self._readers: OrderedDict[int, set[str]] = OrderedDict()
        self._read: dict[str, int] = {}  # beginnings remembered of each replica

    def __len__(self) -> int:
        return len(self._readers)

    def rank(self, numbers: Sequence[int], loads: Mapping[str, int]) -> Ranking:
        """Whom to ask: of those that are not too busy, who has read most of it; among equals the least busy, then who
        remembers least, so that new beginnings spread. loads: requests that each replica works on."""
        if not loads:
            return Ranking([], 0, False)
        matched = self._matched(numbers, loads)
        limit = min(loads.values()) + self._slack

        def key(replica: str) -> tuple[bool, int, int, int, str]:
            is_busy = loads[replica] > limit
            return is_busy, -matched[replica], loads[replica], self._read.get(replica, 0), replica

        ranked = sorted(loads, key=key)
        return Ranking(ranked, matched[ranked[0]], matched[ranked[0]] < max(matched.values()))

    def record(self, numbers: Sequence[int], replica: str) -> None:
        """The replica is about to read a prompt that begins so."""
        for number in reversed(numbers):  # so that the shortest, which most prompts share, is the last to be forgotten
            readers = self._readers.setdefault(number, set())
            if replica not in readers:
                readers.add(replica)
                self._read[replica] = self._read.get(replica, 0) + 1
            self._readers.move_to_end(number)
        while len(self._readers) > self._capacity:
            _, readers = self._readers.popitem(last=False)
            for reader in readers:
                self._read[reader] -= 1

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets all but these replicas."""
        gone = self._read.keys() - set(replicas)
        if not gone:
            return
        for number in list(self._readers):
            readers = self._readers[number]
            readers -= gone
            if not readers:
                del self._readers[number]
        for replica in gone:
            del self._read[replica]

    def _matched(self, numbers: Sequence[int], replicas: Collection[str]) -> dict[str, int]:
        """Blocks from the beginning on that each replica has read."""
        matched = dict.fromkeys(replicas, 0)
        still = set(replicas)
        for count, number in enumerate(numbers, start=1):
            still &= self._readers.get(number, set())
            if not still:
                break
            for replica in still:
                matched[replica] = count
        return matched
