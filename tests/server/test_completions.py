from __future__ import annotations

from typing import Any

import httpx
import pytest
from answers import expected
from fake_engine import logprob, verdicts

from server.completions import DEFAULT_MAX_TOKENS


def complete(http: httpx.Client, prompt: Any, **options: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_the_answer_has_openais_shape(http: httpx.Client) -> None:
    answer = complete(http, "Hello")
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "fake"
    assert answer["choices"] == [
        {"index": 0, "text": "HelloHelloHelloH", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 16,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"chunks": [8, 4]},
    }


def test_byte_ids_are_taken_verbatim(http: httpx.Client) -> None:
    answer = complete(http, [104, 105], return_token_ids=True, max_tokens=3)
    assert answer["choices"][0]["prompt_token_ids"] == [104, 105]
    assert answer["choices"][0]["token_ids"] == [104, 105, 104]
    assert answer["usage"]["prompt_tokens"] == 2


def test_bos_is_prepended_to_text_unless_that_is_not_wanted(http: httpx.Client) -> None:
    assert complete(http, "hi", return_token_ids=True)["choices"][0]["prompt_token_ids"] == [254, 104, 105]
    plain = complete(http, "hi", return_token_ids=True, add_special_tokens=False)
    assert plain["choices"][0]["prompt_token_ids"] == [104, 105]


def test_an_empty_text_is_bos_alone(http: httpx.Client) -> None:
    answer = complete(http, "", return_token_ids=True, max_tokens=7)
    assert answer["choices"][0]["prompt_token_ids"] == [254]
    assert answer["choices"][0]["text"] == "nothing"


@pytest.mark.parametrize("prompts", [["one", "two ", "three"], [[111, 110, 101], [116, 119, 111, 32], [51]]])
def test_choices_of_several_prompts_come_prompt_by_prompt(http: httpx.Client, prompts: list[Any]) -> None:
    answer = complete(http, prompts, n=2, seed=3, temperature=1, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        prompt, number = prompts[choice["index"] // 2], choice["index"] % 2
        data = prompt.encode() if isinstance(prompt, str) else bytes(prompt)
        assert choice["token_ids"] == list(expected(data, choice=number, seed=3))
    bos = isinstance(prompts[0], str)
    assert answer["usage"]["prompt_tokens"] == sum(len(prompt) + bos for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 6 * DEFAULT_MAX_TOKENS


def test_a_seed_fixes_the_bytes_and_without_one_every_request_draws_its_own(http: httpx.Client) -> None:
    prompt = "".join(map(chr, range(32, 127)))
    seeded = {complete(http, prompt, seed=5, temperature=1)["choices"][0]["text"] for _ in range(5)}
    drawn = {complete(http, prompt, temperature=1)["choices"][0]["text"] for _ in range(12)}
    assert len(seeded) == 1
    assert len(drawn) > 1


def test_max_tokens_left_out_is_16_or_what_is_left(http: httpx.Client) -> None:
    assert complete(http, "x" * 100)["usage"]["completion_tokens"] == 16
    assert complete(http, "x" * 500)["usage"]["completion_tokens"] == 512 - 501


def test_max_tokens_0_with_echo_scores_a_prompt(http: httpx.Client) -> None:
    answer = complete(http, "héllo", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    data = b"\xfe" + "héllo".encode()
    assert choice["text"] == "héllo"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_ids"] == list(data)
    assert choice["logprobs"]["token_logprobs"] == [None, *map(logprob, data[1:])]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3, 4]
    assert answer["usage"]["completion_tokens"] == 0


def test_max_tokens_0_without_echo_is_an_empty_text(http: httpx.Client) -> None:
    assert complete(http, "hi", max_tokens=0)["choices"][0]["text"] == ""


def test_echo_puts_the_prompt_before_the_completion_without_bos(http: httpx.Client) -> None:
    assert complete(http, "hi", echo=True, max_tokens=2)["choices"][0]["text"] == "hihi"
    assert complete(http, [254, 104, 105], echo=True, max_tokens=2)["choices"][0]["text"] == "hihi"


def test_all_256_alternatives_have_keys_of_their_own(http: httpx.Client) -> None:
    (entry,) = complete(http, "A", logprobs=256, max_tokens=1)["choices"][0]["logprobs"]["top_logprobs"]
    assert len(entry) == 256
    assert entry["A"] == logprob(65)
    assert entry["\\x0a"] == logprob(10)
    assert entry["\\\\"] == logprob(92)
    named = complete(http, "A", logprobs=256, max_tokens=1, return_tokens_as_token_ids=True)
    logprobs = named["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:65"]
    assert set(logprobs["top_logprobs"][0]) == {f"token_id:{byte}" for byte in range(256)}


def test_a_stop_string_ends_the_text_and_is_left_out(http: httpx.Client) -> None:
    (choice,) = complete(http, "abc", stop=["x", "c"])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "c")


def test_eos_ends_the_text_and_counts_nowhere(http: httpx.Client) -> None:
    answer = complete(http, "abc!eos", logprobs=0, return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc!e", "stop", 255)
    assert choice["token_ids"] == list(b"abc!e") == choice["logprobs"]["token_ids"]
    assert answer["usage"]["completion_tokens"] == 5


def test_ignore_eos_goes_on(http: httpx.Client) -> None:
    assert complete(http, "abc!eos", ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_chunks_cover_prompt_and_completion_and_the_last_byte_has_none(http: httpx.Client) -> None:
    (choice,) = complete(http, "abcde", max_tokens=9, return_chunks=True)["choices"]
    known = [{"stage": chunk.stage, "start": chunk.start, "p": chunk.p} for chunk in verdicts(0, 6 + 9 - 1)]
    assert choice["chunks"] == known


def test_a_row_that_fails_ends_with_an_error_and_harms_no_other(http: httpx.Client) -> None:
    answer = complete(http, ["good", "bad!nan", "fine"], max_tokens=8)
    good, bad, fine = answer["choices"]
    assert (good["text"], good["finish_reason"]) == ("goodgood", "length")
    assert (bad["text"], bad["finish_reason"], bad["error"]) == ("bad", "error", "a logit is not a number")
    assert (fine["text"], fine["finish_reason"]) == ("finefine", "length")


def test_a_request_the_engine_refuses_ends_with_an_error(http: httpx.Client) -> None:
    (choice,) = complete(http, "!refuse")["choices"]
    assert (choice["finish_reason"], choice["error"]) == ("error", "this prompt is refused")


def test_parameters_nobody_knows_are_ignored_and_named(http: httpx.Client) -> None:
    body = {
        "prompt": "a",
        "top_kk": 3,
        "naïve\n": 1,
        "a,b": 1,
        "stream": True,
        "stream_options": {"include_usage": False, "include_cats": True},
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    named = answer.headers["x-ignored-params"]
    assert named == "top_kk, na\\xefve\\x0a, a\\x2cb, stream_options.include_cats"


def test_the_header_of_ignored_names_is_bounded(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", **{f"unknown_{number}": 1 for number in range(1000)}})
    assert answer.status_code == 200
    assert len(answer.headers["x-ignored-params"]) <= 1024


def test_the_request_id_of_the_body_names_the_completion(http: httpx.Client) -> None:
    assert complete(http, "a", request_id="mine")["id"] == "cmpl-mine"


def test_one_request_id_may_be_used_twice_at_once(http: httpx.Client) -> None:
    answer = complete(http, ["a", "b"], n=4, request_id="twice")
    assert len(answer["choices"]) == 8


def test_an_answer_full_of_numbers_is_put_together_like_any_other(http: httpx.Client) -> None:
    answer = complete(http, "x", max_tokens=500, logprobs=256)
    tops = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert len(tops) == 500
    assert all(len(top) == 256 for top in tops)
