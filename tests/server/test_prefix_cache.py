"""What a client sees of the prefix cache: `usage` and `cache_salt`, on a fake engine that knows old prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from answers import events
from conftest import Running

from hnet_runtime.engine.messages import Output, Usage
from server.choice import Choice, ChoiceOptions
from server.completions import usage


@pytest.fixture
def cached(serve_in_thread: Callable[..., Running]) -> Iterator[httpx.Client]:
    with serve_in_thread(prefix_cache=True).client() as client:
        yield client


def counts(http: httpx.Client, prompt: Any, **options: Any) -> tuple[int, int]:
    """prompt_tokens and cached_tokens."""
    answer = http.post("/v1/completions", json={"prompt": prompt, **options})
    assert answer.status_code == 200, answer.text
    told = answer.json()["usage"]
    return told["prompt_tokens"], told["prompt_tokens_details"]["cached_tokens"]


def test_cached_tokens_are_the_bytes_that_were_not_read_again(cached: httpx.Client) -> None:
    assert counts(cached, "Once upon a time") == (17, 0)
    assert counts(cached, "Once upon a time") == (17, 17)
    assert counts(cached, "Once upon a hill") == (17, 13)
    assert counts(cached, "Another") == (8, 1)  # BOS


def test_choices_of_one_prompt_are_no_hits_of_one_another(cached: httpx.Client) -> None:
    assert counts(cached, "abcdef", n=8) == (7, 0)
    assert counts(cached, "abcdef", n=8) == (7, 7)


def test_every_prompt_counts_once(cached: httpx.Client) -> None:
    counts(cached, "abcdef")
    # The second prompt shares BOS, the third one the whole of the second.
    assert counts(cached, ["abcxyz", "nothing", "nothing"], n=3) == (7 + 8 + 8, 4 + 1 + 8)


def test_an_echoed_prompt_with_logprobs_is_read_anew(cached: httpx.Client) -> None:
    assert counts(cached, "abc") == (4, 0)
    assert counts(cached, "abc", echo=True, logprobs=1) == (4, 0)


def test_only_requests_of_one_salt_share(cached: httpx.Client) -> None:
    assert counts(cached, "abc", cache_salt="mine") == (4, 0)
    assert counts(cached, "abc") == (4, 0)
    assert counts(cached, "abc", cache_salt="yours") == (4, 0)
    assert counts(cached, "abc", cache_salt="mine") == (4, 4)
    assert counts(cached, "abc", cache_salt=None) == (4, 4)


def test_a_stream_tells_the_same(cached: httpx.Client) -> None:
    body = {"prompt": ["abc", "de"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    told = [events(cached.post("/v1/completions", json=body).text)[-1]["usage"] for _ in range(2)]
    assert [each["prompt_tokens_details"]["cached_tokens"] for each in told] == [0 + 1, 4 + 3]
    assert told[1]["prompt_tokens"] == 7


def test_usage_so_far_has_no_hits_until_they_are_known(cached: httpx.Client) -> None:
    counts(cached, "abc")
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "abc", "n": 2, "max_tokens": 20, "stream": True, "stream_options": options}
    *pieces, last = events(cached.post("/v1/completions", json=body).text)
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    for event in pieces:
        (choice,) = event["choices"]
        found = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert event["usage"]["prompt_tokens"] == 4
        if choice["index"] == 0:
            assert found == (4 if choice["finish_reason"] else 0)
        assert found in (0, 4)


def test_usage_counts_a_prompt_by_its_first_choice_alone() -> None:
    choices = [Choice(index, b"\xfeabc", ChoiceOptions()) for index in range(2)]
    for choice, found in zip(choices, (1, 4), strict=True):
        took = Usage(
            prompt_bytes=4,
            completion_bytes=0,
            chunks=(2,),
            queue_seconds=0.0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
            cached_bytes=found,
        )
        assert usage(choices[:1], [choice])["prompt_tokens_details"] == {"cached_tokens": choices[0].cached_bytes}
        choice.add(Output(request_id="x", finish_reason="length", usage=took))
    assert usage(choices[:1], choices) == {
        "prompt_tokens": 4,
        "completion_tokens": 0,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"chunks": [4]},
    }
