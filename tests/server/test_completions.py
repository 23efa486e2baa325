from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from answers import expected
from conftest import Running
from fake_engine import FakeEngine, logprob, verdicts

from hnet_runtime.engine import messages
from server.choice import Choice, ChoiceOptions
from server.completions import DEFAULT_MAX_TOKENS, sampling_params, truncated
from server.schemas import CompletionRequest, parse


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


# ── parameters that reach the engine ────────────────────────────────────────────────────────────


def params_of(**body: Any) -> messages.SamplingParams:
    request, unknown = parse(msgspec.json.encode({"prompt": "x", "seed": 1, **body}), CompletionRequest)
    assert unknown == []
    return sampling_params(request, logprobs=None)


def test_a_request_that_asks_for_nothing_is_the_engines_defaults() -> None:
    assert params_of() == messages.SamplingParams(seed=1)
    neutral = {"logit_bias": {}, "bad_words": [], "stop_token_ids": [], "stop": [], "repetition_penalty": 1}
    assert params_of(**neutral) == messages.SamplingParams(seed=1)


def test_every_sampling_parameter_reaches_the_engine_as_it_was_meant() -> None:
    body = {
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"0": -100, "255": 1.5},
        "allowed_token_ids": [66, 65, 66],
        "bad_words": ["é", "bad"],
        "min_tokens": 7,
        "stop": "end",
        "stop_token_ids": [13, 10],
        "include_stop_str_in_output": True,
        "temperature": 0.5,
        "ignore_eos": True,
        "utf8": "raw",
    }
    assert params_of(**body) == messages.SamplingParams(
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias=((0, -100.0), (255, 1.5)),
        allowed_token_ids=(65, 66),
        bad_words=("é".encode(), b"bad"),
        min_tokens=7,
        stop=(b"end",),
        stop_token_ids=(10, 13),
        include_stop_str_in_output=True,
        temperature=0.5,
        ignore_eos=True,
        utf8="raw",
        seed=1,
    )


def test_the_priority_is_the_requests(serve_in_thread: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = FakeEngine.submit

    def noted(self: FakeEngine, request: messages.Request) -> None:
        seen.append(request.priority)
        submit(self, request)

    monkeypatch.setattr(FakeEngine, "submit", noted)
    with serve_in_thread().client() as http:
        complete(http, ["a", "b"], priority=-7)
        complete(http, "a")
    assert seen == [-7, -7, 0]


# ── the best of several ─────────────────────────────────────────────────────────────────────────


def test_the_best_of_several_are_those_of_the_highest_mean_log_probability(http: httpx.Client) -> None:
    """The fake says that a low byte is likely, and begins choice i with the prompt's byte i."""
    prompt, options = [97, 122, 98, 48, 121], {"max_tokens": 2, "temperature": 1, "seed": 5}
    drawn = [bytes(expected(bytes(prompt), 2, choice, 5)) for choice in range(5)]
    ranked = sorted(drawn, key=lambda data: -sum(map(logprob, data)))
    answer = complete(http, prompt, n=2, best_of=5, return_token_ids=True, **options)
    assert [bytes(choice["token_ids"]) for choice in answer["choices"]] == ranked[:2]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 5 * 2
    assert answer["usage"]["prompt_tokens"] == 5


def test_the_best_of_several_prompts_are_each_prompts_own(http: httpx.Client) -> None:
    answer = complete(http, ["ab", "yz"], n=1, best_of=4, max_tokens=3, temperature=1, seed=2, logprobs=1)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert set(texts[0]) <= set("ab")
    assert set(texts[1]) <= set("yz")
    assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in answer["choices"])


def test_a_candidate_that_failed_or_said_nothing_comes_last() -> None:
    choices = [Choice(index, b"\xfe", ChoiceOptions()) for index in range(4)]
    low = messages.ByteLogprobs(65, -9.0)
    choices[0].add(messages.Output(request_id="0", finish_reason="error", error="no", data=b"A", logprobs=(low,)))
    choices[1].add(messages.Output(request_id="1", finish_reason="stop", stop_reason=255))
    choices[2].add(messages.Output(request_id="2", data=b"A", logprobs=(low,)))
    choices[2].add(messages.Output(request_id="2", data=b"A", logprobs=(messages.ByteLogprobs(65, -1.0),)))
    choices[3].add(messages.Output(request_id="3", data=b"A", logprobs=(low,)))
    assert [choice.mean_logprob for choice in choices] == [-math.inf, -math.inf, -5.0, -9.0]


# ── prompts cut and scored ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "most", "read"),
    [
        ("abcdef", 3, b"\xfeef"),
        ("abcdef", 1, b"\xfe"),
        ("abcdef", 7, b"\xfeabcdef"),
        ("abcdef", 100, b"\xfeabcdef"),
        ("aéé", 4, b"\xfe" + "é".encode()),  # no part of a character
        ("aéé", 5, b"\xfe" + "éé".encode()),
        ([97, 98, 99], 2, b"bc"),
        ([254, 97, 98, 99], 2, b"\xfec"),
        ([0xC3, 0xA9, 97], 2, b"\xa9a"),  # bytes are bytes
    ],
)
def test_a_prompt_is_cut_to_its_last_bytes_and_keeps_its_bos(
    http: httpx.Client, prompt: Any, most: int, read: bytes
) -> None:
    answer = complete(http, prompt, truncate_prompt_tokens=most, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == list(read)
    assert answer["usage"]["prompt_tokens"] == len(read)


def test_a_text_without_bos_is_cut_to_whole_characters_but_never_to_nothing() -> None:
    assert truncated("aé".encode(), 2, is_text=True) == "é".encode()
    assert truncated("éa".encode(), 2, is_text=True) == b"a"
    assert truncated("aé".encode(), 1, is_text=True) == b"\xa9"


def test_a_prompt_cut_to_fit_leaves_room_to_complete(http: httpx.Client) -> None:
    answer = complete(http, "x" * 600, truncate_prompt_tokens=-1, max_tokens=100)
    assert answer["usage"]["prompt_tokens"] == 412
    assert answer["usage"]["completion_tokens"] == 100
    assert complete(http, "x" * 600, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 512 - DEFAULT_MAX_TOKENS


def test_prompt_logprobs_have_vllms_shape(http: httpx.Client) -> None:
    (choice,) = complete(http, "A\n", prompt_logprobs=2, max_tokens=1)["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "0": {"logprob": logprob(0), "rank": 1, "decoded_token": "\\x00"},
            "1": {"logprob": logprob(1), "rank": 2, "decoded_token": "\\x01"},
            "65": {"logprob": logprob(65), "rank": 66, "decoded_token": "A"},
        },
        {
            "0": {"logprob": logprob(0), "rank": 1, "decoded_token": "\\x00"},
            "1": {"logprob": logprob(1), "rank": 2, "decoded_token": "\\x01"},
            "10": {"logprob": logprob(10), "rank": 11, "decoded_token": "\\x0a"},
        },
    ]
    assert choice["logprobs"] is None


def test_all_prompt_logprobs_and_none_at_all(http: httpx.Client) -> None:
    (choice,) = complete(http, "A", prompt_logprobs=-1, max_tokens=0)["choices"]
    assert list(choice["prompt_logprobs"][1]) == [str(byte) for byte in range(256)]
    (choice,) = complete(http, "A", prompt_logprobs=0, return_tokens_as_token_ids=True)["choices"]
    assert choice["prompt_logprobs"][1] == {"65": {"logprob": logprob(65), "rank": 66, "decoded_token": "token_id:65"}}
    assert "prompt_logprobs" not in complete(http, "A")["choices"][0]


def test_an_echo_and_prompt_logprobs_show_each_as_many_as_they_ask_for(http: httpx.Client) -> None:
    (choice,) = complete(http, "AB", prompt_logprobs=3, echo=True, logprobs=1, max_tokens=1)["choices"]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [4, 4]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2, 2, 2]


def test_an_answer_full_of_numbers_is_put_together_like_any_other(http: httpx.Client) -> None:
    answer = complete(http, "x", max_tokens=500, logprobs=256)
    tops = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert len(tops) == 500
    assert all(len(top) == 256 for top in tops)
