"""The prefix tree: it finds what a naive dict of prefixes finds, and gives up what a naive list would."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hnet_runtime.state.prefix import Match, PrefixTree

SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True)
LARGE = 10**9


def tree_of(*keys: bytes, budget: int = LARGE, num_bytes: int = 1) -> PrefixTree[bytes]:
    """Snapshots at the end of each key, the key its payload."""
    tree = PrefixTree[bytes](budget)
    for key in keys:
        assert tree.insert("", key, key, num_bytes) == []
    tree.check()
    return tree


# ── against a naive model ─────────────────────────────────────────────────────────────────────


@dataclass
class Entry:
    payload: int
    num_bytes: int
    clock: float
    touched: int


class NaiveTree:
    """What PrefixTree says of itself, over a dict of keys."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.entries: dict[tuple[str, bytes], Entry] = {}
        self.clock, self.touches = 0.0, 0

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    def value(self, salt: str, data: bytes) -> float:
        above = [len(key) for other, key in self.entries if other == salt and key != data and data.startswith(key)]
        entry = self.entries[salt, data]
        return entry.clock + (len(data) - max(above, default=0)) / entry.num_bytes

    def touch(self, entry: Entry) -> None:
        self.touches += 1
        entry.clock, entry.touched = self.clock, self.touches

    def lookup(self, salt: str, data: bytes, limit: int | None) -> tuple[int, int] | None:
        longest = len(data) if limit is None else min(limit, len(data))
        found = [key for other, key in self.entries if other == salt and len(key) <= longest and data.startswith(key)]
        if not found:
            return None
        entry = self.entries[salt, max(found, key=len)]
        self.touch(entry)
        return len(max(found, key=len)), entry.payload

    def shared(self, salt: str, data: bytes) -> int:
        keys = [key for other, key in self.entries if other == salt]
        return max(
            (n for key in keys for n in range(len(data) + 1) if key[:n] == data[:n] and n <= len(key)), default=0
        )

    def insert(self, salt: str, data: bytes, payload: int, num_bytes: int) -> list[int]:
        if num_bytes > self.budget_bytes:
            return [payload]
        returned = []
        while self.num_bytes + num_bytes > self.budget_bytes + self.bytes_at(salt, data):
            returned += self.evict(1)
        if (salt, data) in self.entries:
            returned.append(self.entries.pop((salt, data)).payload)
        self.entries[salt, data] = Entry(payload, num_bytes, 0.0, 0)
        self.touch(self.entries[salt, data])
        return returned

    def bytes_at(self, salt: str, data: bytes) -> int:
        return self.entries[salt, data].num_bytes if (salt, data) in self.entries else 0

    def evict(self, num: int) -> list[int]:
        evicted = []
        while self.entries and len(evicted) < num:
            worst = min(self.entries, key=lambda key: (self.value(*key), self.entries[key].touched))
            self.clock = max(self.clock, self.value(*worst))
            evicted.append(self.entries.pop(worst).payload)
        return evicted


class PrefixTreeMachine(RuleBasedStateMachine):
    salts = st.sampled_from(["", "a", "b"])
    # Few letters and repeats of them: prefixes of one another, branches inside edges, long edges.
    keys = st.lists(st.sampled_from([b"a", b"b", b"aa", b"abab", b"\x00", b"\xff" * 7]), max_size=5).map(b"".join)

    @initialize(budget=st.one_of(st.integers(0, 12), st.just(LARGE)))
    def begin(self, budget: int) -> None:
        self.tree = PrefixTree[int](budget)
        self.naive = NaiveTree(budget)
        self.next_payload = 0

    @rule(salt=salts, data=keys, num_bytes=st.integers(1, 7))
    def insert(self, salt: str, data: bytes, num_bytes: int) -> None:
        payload, self.next_payload = self.next_payload, self.next_payload + 1
        expected = self.naive.insert(salt, data, payload, num_bytes)
        assert self.tree.insert(salt, data, payload, num_bytes) == expected

    @rule(salt=salts, data=keys, limit=st.none() | st.integers(-1, 20))
    def lookup(self, salt: str, data: bytes, limit: int | None) -> None:
        expected = self.naive.lookup(salt, data, limit)
        assert self.tree.lookup(salt, data, limit) == (None if expected is None else Match(*expected))

    @rule(salt=salts, data=keys)
    def shared(self, salt: str, data: bytes) -> None:
        assert self.tree.shared(salt, data) == self.naive.shared(salt, data)

    @rule(num=st.integers(0, 3))
    def evict(self, num: int) -> None:
        assert self.tree.evict(num) == self.naive.evict(num)

    @rule()
    def clear(self) -> None:
        assert sorted(self.tree.clear()) == sorted(entry.payload for entry in self.naive.entries.values())
        self.naive.entries.clear()

    @invariant()
    def the_tree_knows_what_the_dict_knows(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        assert self.tree.num_bytes == self.naive.num_bytes <= self.tree.budget_bytes
        assert self.tree.num_snapshots == len(self.naive.entries)
        assert sorted(self.tree.payloads()) == sorted(entry.payload for entry in self.naive.entries.values())
        for (salt, data), entry in self.naive.entries.items():
            assert self.tree.shared(salt, data + b"!") == len(data)
            assert entry.payload in self.tree.payloads()


TestPrefixTree = PrefixTreeMachine.TestCase
TestPrefixTree.settings = SETTINGS


# ── what is found ─────────────────────────────────────────────────────────────────────────────


def test_an_empty_tree_knows_nothing():
    tree = PrefixTree[str](LARGE)
    assert tree.lookup("", b"anything") is None
    assert tree.shared("", b"anything") == 0
    assert tree.evict(3) == tree.clear() == list(tree.payloads()) == []
    tree.check()


def test_the_deepest_snapshot_on_the_path_is_found():
    tree = tree_of(b"ab", b"abcd", b"abcdefgh", b"abxy")
    assert tree.lookup("", b"abcdefzz") == Match(4, b"abcd")
    assert tree.lookup("", b"abcdefgh") == Match(8, b"abcdefgh")
    assert tree.lookup("", b"abc") == Match(2, b"ab")
    assert tree.lookup("", b"a") is None


def test_a_limit_leaves_bytes_to_run():
    tree = tree_of(b"ab", b"abcd")
    assert tree.lookup("", b"abcd", limit=3) == Match(2, b"ab")
    assert tree.lookup("", b"abcd", limit=4) == Match(4, b"abcd")
    assert tree.lookup("", b"abcd", limit=1) is None


def test_a_snapshot_of_no_bytes_is_found_under_everything():
    tree = tree_of(b"", b"ab")
    assert tree.lookup("", b"") == tree.lookup("", b"xyz") == Match(0, b"")
    assert tree.lookup("", b"", limit=-1) is None
    assert sorted(tree.clear()) == [b"", b"ab"]


def test_a_payload_may_be_none():
    tree = PrefixTree[None](LARGE)
    tree.insert("", b"ab", None, 1)
    assert tree.lookup("", b"ab") == Match(2, None)
    assert tree.num_snapshots == 1
    assert tree.evict() == [None]


def test_shared_ends_inside_an_edge():
    tree = tree_of(b"system: be kind")
    assert tree.shared("", b"system: be brief") == len(b"system: be ")
    assert tree.shared("", b"system") == len(b"system")
    assert tree.shared("", b"system: be kind, and more") == len(b"system: be kind")
    assert tree.shared("", b"user") == 0


def test_salts_share_nothing_but_the_budget():
    tree = PrefixTree[str](2)
    tree.insert("one", b"abcd", "one", 1)
    assert tree.shared("two", b"abcd") == 0
    assert tree.lookup("two", b"abcd") is None
    tree.insert("two", b"abcdef", "two", 1)
    assert tree.lookup("one", b"abcdef") == Match(4, "one")
    assert tree.insert("three", b"abcdefgh", "three", 1) == ["one"]  # the least saved
    assert tree.shared("one", b"abcd") == 0
    tree.check()


def test_a_salt_goes_with_its_last_snapshot():
    tree = PrefixTree[str](LARGE)
    tree.insert("one", b"ab", "ab", 1)
    tree.insert("one", b"ac", "ac", 1)
    tree.insert("two", b"", "", 1)
    tree.evict(2)
    assert set(tree._roots) == {"one"}
    tree.evict()
    assert not tree._roots
    tree.check()


# ── edges ─────────────────────────────────────────────────────────────────────────────────────


def edges_of(tree: PrefixTree[bytes]) -> list[bytes]:
    return sorted(node.edge for node in tree._nodes() if node.parent is not None)


def test_one_key_may_begin_another_in_either_order():
    for keys in [(b"ab", b"abcd"), (b"abcd", b"ab")]:
        assert edges_of(tree_of(*keys)) == [b"ab", b"cd"]


def test_a_branch_inside_an_edge_splits_it():
    assert edges_of(tree_of(b"abcd", b"abxy")) == [b"ab", b"cd", b"xy"]


def test_a_branch_that_is_none_any_more_is_merged():
    tree = tree_of(b"abcdef", b"abx")
    assert tree.evict() == [b"abx"]
    assert edges_of(tree) == [b"abcdef"]
    tree.check()


def test_a_snapshot_that_goes_from_a_path_leaves_one_edge():
    tree = tree_of(b"ab", b"abcdef")
    assert tree.evict() == [b"ab"]
    assert edges_of(tree) == [b"abcdef"]
    assert tree.lookup("", b"abcdef") == Match(6, b"abcdef")
    tree.check()


def test_a_branch_outlives_its_own_snapshot():
    tree = tree_of(b"a", b"abcd", b"axyz")
    assert tree.evict() == [b"a"]
    assert edges_of(tree) == [b"a", b"bcd", b"xyz"]
    tree.check()


@pytest.mark.parametrize("order", [1, -1])
def test_a_path_of_a_thousand_snapshots(order):
    keys = [b"x" * length for length in range(1, 1001)][::order]
    tree = tree_of(*keys)
    assert tree.lookup("", b"x" * 2000) == Match(1000, b"x" * 1000)
    assert tree.lookup("", b"x" * 2000, limit=500) == Match(500, b"x" * 500)
    assert tree.shared("", b"x" * 700 + b"y") == 700
    assert len(tree.evict(999)) == 999
    tree.check()
    assert len(edges_of(tree)) == 1
    assert len(tree.clear()) == 1


# ── what is given up ──────────────────────────────────────────────────────────────────────────


def test_the_same_place_twice_gives_the_old_one_back():
    tree = PrefixTree[str](10)
    tree.insert("", b"ab", "old", 4)
    assert tree.insert("", b"ab", "new", 10) == ["old"]  # nothing else needs to go
    assert (tree.num_bytes, tree.num_snapshots) == (10, 1)
    assert tree.lookup("", b"ab") == Match(2, "new")
    tree.check()


def test_a_successor_of_the_same_size_costs_nobody_a_place():
    tree = tree_of(b"long" * 10, b"ab", budget=2)
    assert tree.insert("", b"long" * 10, b"new", 1) == [b"long" * 10]
    assert sorted(tree.payloads()) == [b"ab", b"new"]
    tree.check()


def test_what_is_replaced_may_be_evicted_to_make_room_for_its_successor():
    tree = PrefixTree[str](10)
    tree.insert("", b"ab", "old", 4)
    tree.insert("", b"xyzw", "other", 6)
    assert tree.insert("", b"ab", "new", 5) == ["old", "other"]
    assert list(tree.payloads()) == ["new"]
    tree.check()


def test_a_budget_of_nothing_refuses_everything():
    tree = PrefixTree[str](0)
    assert tree.insert("", b"ab", "ab", 1) == ["ab"]
    assert (tree.num_bytes, tree.num_snapshots, tree.budget_bytes) == (0, 0, 0)
    assert tree.shared("", b"ab") == 0
    tree.check()


def test_a_snapshot_larger_than_the_budget_changes_nothing():
    tree = tree_of(b"ab", b"cd", budget=3)
    assert tree.insert("", b"ab", b"large", 4) == [b"large"]
    assert sorted(tree.payloads()) == [b"ab", b"cd"]
    tree.check()


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_a_snapshot_takes_memory(num_bytes):
    tree = PrefixTree[str](10)
    with pytest.raises(ValueError, match="a snapshot of"):
        tree.insert("", b"ab", "ab", num_bytes)
    assert tree.shared("", b"ab") == 0
    with pytest.raises(ValueError, match="a budget of -1"):
        PrefixTree[str](-1)


def test_of_equals_the_one_touched_longest_ago_goes_first():
    tree = tree_of(b"ab", b"cd", b"ef")
    tree.lookup("", b"ab")
    assert tree.evict(3) == [b"cd", b"ef", b"ab"]


def test_work_saved_outweighs_recency():
    tree = tree_of(b"long" * 10, b"ab")
    assert tree.evict() == [b"ab"]


def test_a_large_snapshot_goes_before_a_small_one_that_saves_as_much():
    tree = PrefixTree[str](LARGE)
    tree.insert("", b"abcd", "small", 1)
    tree.insert("", b"efgh", "large", 3)
    assert tree.evict(2) == ["large", "small"]


def test_what_saved_much_once_ages():
    tree = PrefixTree[bytes](3)
    tree.insert("", b"x" * 5, b"unused", 1)
    given_back = [payload for n in range(12) for payload in tree.insert("", b"%02d" % n, b"%02d" % n, 1)]
    assert b"unused" in given_back
    assert tree.num_snapshots == 3


def test_a_hit_keeps_what_is_used():
    tree = PrefixTree[bytes](3)
    tree.insert("", b"x" * 5, b"used", 1)
    for n in range(12):
        assert b"used" not in tree.insert("", b"%02d" % n, b"%02d" % n, 1)
        assert tree.lookup("", b"x" * 9) == Match(5, b"used")


def test_the_clock_never_goes_back():
    tree = tree_of(b"d" * 8, b"k" * 6, b"x" * 5)
    assert tree.evict() == [b"x" * 5]  # at 5 from now on
    tree.insert("", b"d" * 7, b"above", 1)
    assert tree.evict() == [b"d" * 8]  # worth 1 since there is one above it, and put in before the clock was at 5
    tree.insert("", b"ab", b"ab", 1)
    assert tree.evict(2) == [b"k" * 6, b"ab"]  # 6, and 5 + 2


def test_a_snapshot_saves_what_the_one_above_does_not():
    tree = tree_of(b"abcdefgh", b"xyz")
    tree.insert("", b"abcdefg", b"above", 1)
    assert tree.evict() == [b"abcdefgh"]  # one byte after `above`
    tree = tree_of(b"abcdefgh", b"xyz")
    tree.insert("", b"a", b"above", 1)
    assert tree.evict(2) == [b"above", b"xyz"]  # and all eight again once that is gone


def test_thousands_of_snapshots_under_one_prefix():
    tree = PrefixTree[int](2000)
    system = b"system" * 100
    tree.insert("", system, -1, 1)
    for n in range(5000):
        tree.insert("", system + b"user %d" % n, n, 1)
        assert tree.lookup("", system + b"somebody else") == Match(len(system), -1)
    assert tree.num_snapshots == tree.num_bytes == 2000
    assert len(tree._heap) <= 2 * tree.num_snapshots + 65  # stale entries are cleared away
    tree.check()


# ── check ─────────────────────────────────────────────────────────────────────────────────────


def spoil_edge(tree: PrefixTree[bytes]) -> None:
    next(node for node in tree._nodes() if node.edge == b"cd").edge = b""


def spoil_first_byte(tree: PrefixTree[bytes]) -> None:
    next(node for node in tree._nodes() if node.edge == b"cd").edge = b"xd"


def spoil_branch(tree: PrefixTree[bytes]) -> None:
    next(node for node in tree._nodes() if node.edge == b"ab").children.pop(ord("c"))


def spoil_sum(tree: PrefixTree[bytes]) -> None:
    tree._num_bytes += 1


def spoil_saved(tree: PrefixTree[bytes]) -> None:
    node = next(node for node in tree._nodes() if node.edge == b"cd")
    assert node.snapshot is not None
    node.snapshot.saved += 1


def spoil_heap(tree: PrefixTree[bytes]) -> None:
    tree._heap.pop()


def spoil_budget(tree: PrefixTree[bytes]) -> None:
    tree.budget_bytes = 1


def spoil_root(tree: PrefixTree[bytes]) -> None:
    tree._make("nobody", b"")


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (spoil_edge, "an edge is empty"),
        (spoil_first_byte, "another's byte"),
        (spoil_branch, "neither snapshot nor branch"),
        (spoil_sum, "sums are wrong"),
        (spoil_saved, "out of date"),
        (spoil_heap, "cannot be evicted"),
        (spoil_budget, "over budget"),
        (spoil_root, "keeps its root"),
    ],
)
def test_check_finds(spoil, finding):
    tree = tree_of(b"abcd", b"abxy")
    spoil(tree)
    with pytest.raises(AssertionError, match=finding):
        tree.check()
