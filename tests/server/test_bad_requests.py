from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.schemas import CompletionRequest
from server.unsupported import UNSUPPORTED

# What is put into an otherwise good request → the parameter that the answer names.
COMPLETION: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[65], []]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": [256]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [65, True]}, "prompt"),
    ({"prompt": [True, False]}, "prompt"),
    ({"prompt": [65.0]}, "prompt"),
    ({"prompt": [65, "a"]}, "prompt"),
    ({"prompt": ["a", 65]}, "prompt"),
    ({"prompt": ["a", None]}, "prompt"),
    ({"prompt": [[65], "a"]}, "prompt"),
    ({"prompt": [[65, 300]]}, "prompt"),
    ({"prompt": [[[65]]]}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"prompt": "x" * 511}, "prompt"),
    ({"prompt": [65] * 513, "max_tokens": 0}, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 16.0}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 512}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
    ({"prompt": ["a"] * 65, "best_of": 2}, "prompt"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"256": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"065": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"65": 100.5}}, "logit_bias"),
    ({"logit_bias": {"65": "1"}}, "logit_bias"),
    ({"logit_bias": {"65": True}}, "logit_bias"),
    ({"logit_bias": {"65": None}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [256]}, "allowed_token_ids"),
    ({"allowed_token_ids": "a"}, "allowed_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": ["x", ""]}, "bad_words"),
    ({"bad_words": [5]}, "bad_words"),
    ({"bad_words": ["x"] * 65}, "bad_words"),
    ({"bad_words": ["x" * 1025]}, "bad_words"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": 1, "max_tokens": 0}, "min_tokens"),
    ({"min_tokens": 1.0}, "min_tokens"),
    ({"stop_token_ids": 10}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens"),
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"prompt_logprobs": 257}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt": "x" * 400, "prompt_logprobs": 256, "n": 128, "max_tokens": 1}, "prompt_logprobs"),
    ({"priority": 1.5}, "priority"),
    ({"priority": 2**63}, "priority"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": [str(number) for number in range(17)]}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"logprobs": 257}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 256, "n": 128, "max_tokens": 500}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"echo": 1}, "echo"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream_interval": 0}, "stream_interval"),
    ({"utf8": "loose"}, "utf8"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"add_special_tokens": 0}, "add_special_tokens"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"return_tokens_as_token_ids": "x"}, "return_tokens_as_token_ids"),
    ({"return_chunks": []}, "return_chunks"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"cache_salt": ["x"]}, "cache_salt"),
    ({"user": 5}, "user"),
    ({"session_id": 5}, "session_id"),
    ({"request_id": 5}, "request_id"),
    ({"model": 5}, "model"),
]

# A value that uses a parameter nobody can honour here.
USED: dict[str, Any] = {
    "suffix": "x",
    "truncation_side": "right",
    "skip_special_tokens": False,
    "spaces_between_special_tokens": "yes",
    "logprob_token_ids": [65],
    "return_token_offsets": True,
    "repetition_detection": {"max_pattern_size": 3},
    "watermarking": True,
    "thinking_token_budget": 5,
    "routed_experts_prompt_start": 1,
    "mm_payload": {"a": 1},
    "return_mm_kwargs": 1,
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "length_penalty": 2.0,
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "a",
    "guided_whitespace_pattern": " ?",
    "use_beam_search": True,
    "prompt_embeds": "AA==",
    "logits_processors": ["x"],
}


def refused(answer: httpx.Response, param: str | None) -> dict[str, Any]:
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"].count("\n") == 0
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(("change", "param"), COMPLETION, ids=lambda value: str(value)[:50])
def test_a_malformed_completion_request_is_a_400_that_names_the_parameter(
    http: httpx.Client, change: dict[str, Any], param: str | None
) -> None:
    error = refused(http.post("/v1/completions", json={"prompt": "Hello", **change}), param)
    assert str(param).split(".")[0] in error["message"]


@pytest.mark.parametrize(("name", "value"), USED.items())
def test_a_known_parameter_that_cannot_be_honoured_is_a_400_that_names_it(
    http: httpx.Client, name: str, value: Any
) -> None:
    error = refused(http.post("/v1/completions", json={"prompt": "Hello", name: value}), name)
    assert error["code"] == "unsupported_parameter"


def test_every_unsupported_parameter_is_in_the_table_above() -> None:
    assert set(USED) == set(UNSUPPORTED)
    assert not set(USED) & set(CompletionRequest.model_fields)


@pytest.mark.parametrize(
    "harmless",
    [
        *({name: None} for name in [*USED, *CompletionRequest.model_fields] if name != "prompt"),
        {"suffix": ""},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "length_penalty": 1.0},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-3},
        {"logit_bias": {}, "stop_token_ids": [], "bad_words": [], "logits_processors": []},
        {"logit_bias": {"0": -100, "255": 100.0}, "stop_token_ids": [0, 255], "allowed_token_ids": [0, 255, 0]},
        {"bad_words": ["é" * 512] * 64},
        {"min_tokens": 0, "priority": 0, "use_beam_search": False, "include_stop_str_in_output": False},
        {"min_tokens": 16, "priority": -(2**63), "include_stop_str_in_output": True},
        {"truncate_prompt_tokens": -1, "prompt_logprobs": -1},
        {"truncate_prompt_tokens": 2**31},
        {"response_format": {"type": "text"}},
        {"n": 2, "best_of": 2, "stream": True},
        {"n": 2, "best_of": 9},
        {"skip_special_tokens": True, "spaces_between_special_tokens": False, "truncation_side": "left"},
        {"watermarking": False, "thinking_token_budget": -1, "routed_experts_prompt_start": 0},
        {"mm_payload": "tensors", "return_mm_kwargs": True, "return_token_offsets": False, "vllm_xargs": {}},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stop": []},
        {"stop": ["a" * 1024] * 16},
        {"top_k": -1, "top_p": 0, "min_p": 1},
        {"seed": -(2**63)},
        {"logprobs": 256},
        {"request_id": "mine", "user": "somebody", "session_id": "one"},
        {"cache_salt": "x"},
        {"cache_salt": "é" * 256},
    ],
    ids=lambda value: str(value)[:50],
)
def test_defaults_and_neutral_values_are_accepted(http: httpx.Client, harmless: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json={"prompt": "Hello", **harmless})
    assert answer.status_code == 200, answer.text
    assert "x-ignored-params" not in answer.headers


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"prompt": "x"', b"not json", b'{"prompt": NaN}', b'{"prompt": "\xff"}', b"[" * 100_000, b"\x00"],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/segment"])
def test_a_body_that_is_not_json_is_a_400(http: httpx.Client, path: str, body: bytes) -> None:
    assert refused(http.post(path, content=body), None)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null", b"true"])
def test_a_body_that_is_no_object_is_a_400(http: httpx.Client, body: bytes) -> None:
    refused(http.post("/v1/completions", content=body), None)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"prompt": "a\\ud800"', "prompt"),
        ('"prompt": "a", "stop": ["\\udfff"]', "stop"),
        ('"prompt": "a", "cache_salt": "\\ud800"', "cache_salt"),
    ],
)
def test_a_lone_surrogate_is_a_400_that_names_the_parameter(http: httpx.Client, field: str, param: str) -> None:
    refused(http.post("/v1/completions", content="{" + field + "}"), param)


@pytest.mark.parametrize(
    "change",
    [
        {"input": None},
        {"input": 5},
        {"input": []},
        {"input": [256]},
        {"input": [True]},
        {"input": ["a", "b"]},
        {"input": [[65]]},
        {"input": "x" * 512},
        {"input": [65] * 513},
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_malformed_segment_request_is_a_400_that_names_the_parameter(
    http: httpx.Client, change: dict[str, Any]
) -> None:
    refused(http.post("/v1/segment", json=change), "input")


def test_braces_and_odd_characters_of_the_client_come_back_as_they_were(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=json.dumps({"prompt": "x", "model": "{what} {} 😀 \ud800"}))
    assert answer.status_code == 404
    assert "{what} {} 😀 \\ud800" in answer.json()["error"]["message"]


def test_a_prompt_too_long_is_told_with_openais_code(http: httpx.Client) -> None:
    error = refused(http.post("/v1/completions", json={"prompt": "x" * 600}), "prompt")
    assert error["code"] == "context_length_exceeded"


def test_json_is_read_whatever_the_content_type_says(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "Hello"})
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"):
        answer = http.post("/v1/completions", content=body, headers={"content-type": content_type})
        assert answer.status_code == 200
