from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.affinity import BLOCK, MAX_BLOCKS, PrefixAffinity, beginnings

TEXT = bytes(range(256)) * 64


def test_prompts_have_as_many_numbers_in_common_as_whole_blocks_from_their_beginning() -> None:
    one = beginnings(TEXT[: 5 * BLOCK + 3])
    other = beginnings(TEXT[: 3 * BLOCK] + b"?" + TEXT[3 * BLOCK + 1 : 5 * BLOCK])
    assert len(one) == len(other) == 5
    assert one[:3] == other[:3]
    assert not set(one[3:]) & set(other[3:])
    assert beginnings(TEXT[: BLOCK - 1]) == ()
    assert len(beginnings(TEXT)) == MAX_BLOCKS


def test_who_has_read_most_is_asked_first() -> None:
    affinity = PrefixAffinity()
    affinity.record(beginnings(TEXT[: 2 * BLOCK]), "short")
    affinity.record(beginnings(TEXT[: 6 * BLOCK]), "long")
    ranking = affinity.rank(beginnings(TEXT[: 8 * BLOCK]), {"idle": 0, "short": 1, "long": 5})
    assert (ranking.replicas, ranking.matched, ranking.shed) == (["long", "short", "idle"], 6, False)


def test_a_busy_replica_gives_way_however_much_it_has_read() -> None:
    affinity = PrefixAffinity(slack=4)
    affinity.record(beginnings(TEXT[: 6 * BLOCK]), "reader")
    assert affinity.rank(beginnings(TEXT), {"reader": 4, "idle": 0}).replicas == ["reader", "idle"]
    ranking = affinity.rank(beginnings(TEXT), {"reader": 5, "idle": 0})
    assert (ranking.replicas, ranking.matched, ranking.shed) == (["idle", "reader"], 0, True)


def test_new_prompts_go_to_the_least_busy_and_then_to_who_has_read_least() -> None:
    affinity = PrefixAffinity()
    affinity.record(beginnings(TEXT), "a")
    unknown = beginnings(b"?" * 300)
    assert affinity.rank(unknown, {"a": 0, "b": 0}).replicas == ["b", "a"]
    assert affinity.rank(unknown, {"a": 0, "b": 1}).replicas == ["a", "b"]
    assert affinity.rank((), {}).replicas == []


def test_the_oldest_beginnings_are_forgotten_and_the_longest_of_a_prompt_first() -> None:
    affinity = PrefixAffinity(capacity=4)
    affinity.record(beginnings(b"a" * 4 * BLOCK), "x")
    affinity.record(beginnings(b"b" * 2 * BLOCK), "y")
    assert len(affinity) == 4
    assert affinity.rank(beginnings(b"a" * 4 * BLOCK), {"x": 0, "y": 0}).matched == 2
    assert affinity.rank(beginnings(b"b" * 4 * BLOCK), {"x": 0, "y": 0}).matched == 2


def test_a_replica_that_is_gone_is_forgotten() -> None:
    affinity = PrefixAffinity()
    affinity.record(beginnings(TEXT), "gone")
    affinity.record(beginnings(TEXT[: 2 * BLOCK]), "here")
    affinity.keep({"here"})
    ranking = affinity.rank(beginnings(TEXT), {"here": 0, "new": 0})
    assert (ranking.replicas, ranking.matched) == (["here", "new"], 2)
    assert len(affinity) == 2


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="slack must be at least 0"):
        PrefixAffinity(slack=-1)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=3).map(lambda b: b.ljust(1, b"-") * BLOCK))),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 30), min_size=1),
    st.sets(st.sampled_from("abcd")),
)
def test_every_replica_is_ranked_once_and_counts_add_up(
    history: list[tuple[str, bytes]], loads: dict[str, int], kept: set[str]
) -> None:
    affinity = PrefixAffinity(slack=3, capacity=5)
    for replica, prompt in history:
        affinity.record(beginnings(prompt), replica)
        assert len(affinity) <= 5
    affinity.keep(kept)
    for replica, prompt in history:
        ranking = affinity.rank(beginnings(prompt), loads)
        assert sorted(ranking.replicas) == sorted(loads)
        assert loads[ranking.replicas[0]] <= min(loads.values()) + 3
        if replica not in kept:
            affinity.record(beginnings(prompt), "kept")
    remembered = affinity._read
    assert sum(remembered.values()) == sum(len(readers) for readers in affinity._readers.values())
    assert all(count >= 0 for count in remembered.values())
