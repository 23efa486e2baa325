"""`POST /v1/chat/completions` on the fake engine, which repeats its prompt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import events, expected
from conftest import Running
from fake_engine import logprob
from test_routes import error_of

from server.chat import ChatRequest
from server.schemas import GenerationRequest
from server.text import BYTE_KEYS

HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = b"\xfeUser: Hello\n\nAssistant: "
ROUTE = "/v1/chat/completions"


def ask(http: httpx.Client, messages: Any = HELLO, **options: Any) -> httpx.Response:
    return http.post(ROUTE, json={"messages": messages, "temperature": 0, "max_tokens": 8, **options})


def message(http: httpx.Client, messages: Any = HELLO, **options: Any) -> str:
    answer = ask(http, messages, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def prompt_of(http: httpx.Client, messages: Any = HELLO, **options: Any) -> bytes:
    """What the engine was given."""
    answer = ask(http, messages, return_token_ids=True, **options)
    assert answer.status_code == 200, answer.text
    return bytes(answer.json()["choices"][0]["prompt_token_ids"])


# ── whole answers ───────────────────────────────────────────────────────────────────────────────


def test_a_conversation_is_answered_with_a_message(http: httpx.Client) -> None:
    answer = ask(http, model="fake", request_id="one").json()
    created = answer.pop("created")
    assert created > 1_600_000_000
    assert answer == {
        "id": "chatcmpl-one",
        "object": "chat.completion",
        "model": "fake",
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "User: He", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": 8,
            "total_tokens": len(PROMPT) + 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"chunks": [11, 5]},
        },
    }


def test_every_role_has_its_place_in_a_transcript(http: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c", "name": "Ann"},
        {"role": "assistant", "content": "d"},
        {"role": "tool", "content": "e", "tool_call_id": "1"},
    ]
    transcript = b"System: a\n\nSystem: b\n\nAnn: c\n\nAssistant: d\n\nTool: e\n\nAssistant: "
    assert prompt_of(http, messages) == b"\xfe" + transcript


def test_content_may_come_in_parts(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "añ"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    assert prompt_of(http, [{"role": "user", "content": parts}])[1:] == "User: añ\n\nb\n\nAssistant: ".encode()


def test_a_message_can_be_continued_and_bos_left_out(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hi, "}]
    continued = prompt_of(http, messages, continue_final_message=True, add_special_tokens=False)
    assert continued == b"User: Hello\n\nAssistant: Hi, "
    ended = prompt_of(http, messages, add_generation_prompt=False)
    assert ended == b"\xfeUser: Hello\n\nAssistant: Hi, \n\n"


def test_a_transcript_ends_where_somebody_else_would_speak(http: httpx.Client) -> None:
    # The fake repeats its prompt and stops after what it is told to; here a line that begins with "User:".
    answer = ask(http, [{"role": "user", "content": "a\nUser: b"}], max_tokens=100).json()["choices"][0]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", "\nUser:")
    mine = ask(http, max_tokens=100, stop=["l"]).json()["choices"][0]
    assert (mine["finish_reason"], mine["stop_reason"]) == ("stop", "l")


def test_either_name_of_the_limit_will_do(http: httpx.Client) -> None:
    for options in ({"max_completion_tokens": 5, "max_tokens": None}, {"max_completion_tokens": 5, "max_tokens": 5}):
        assert ask(http, **options).json()["usage"]["completion_tokens"] == 5


def test_choices_differ_and_a_seed_fixes_them(http: httpx.Client) -> None:
    answer = ask(http, n=3, seed=5, temperature=1).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [expected(PROMPT, 8, choice, 5).decode() for choice in range(3)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def test_logprobs_are_one_object_a_byte(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "\\ñ"}]
    answer = ask(http, messages, max_tokens=10, logprobs=True, top_logprobs=2).json()["choices"][0]
    data = "User: \\ñ\n\nAssistant: ".encode()[:10]
    top = [{"token": BYTE_KEYS[byte], "logprob": logprob(byte), "bytes": [byte]} for byte in (0, 1)]
    assert answer["logprobs"] == {
        "content": [
            {"token": BYTE_KEYS[byte], "logprob": logprob(byte), "bytes": [byte], "top_logprobs": top} for byte in data
        ],
        "refusal": None,
    }
    bare = ask(http, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert all(item["top_logprobs"] == [] for item in bare)
    assert ask(http, top_logprobs=0).json()["choices"][0]["logprobs"] is None
    named = ask(http, logprobs=True, top_logprobs=256, return_tokens_as_token_ids=True).json()["choices"][0]
    assert [item["token"] for item in named["logprobs"]["content"][0]["top_logprobs"]] == [
        f"token_id:{byte}" for byte in range(256)
    ]


def test_what_this_server_adds_is_told_as_in_completions(http: httpx.Client) -> None:
    options = {"max_tokens": 8, "temperature": 0, "return_chunks": True, "return_token_ids": True}
    prompt = http.post("/v1/completions", json={"prompt": list(PROMPT), **options}).json()["choices"][0]
    chat = ask(http, **options).json()["choices"][0]
    for name in ("chunks", "token_ids", "prompt_token_ids"):
        assert chat[name] == prompt[name]


def test_a_prompt_can_be_cut_to_its_end_and_scored(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "ñ" * 600}]
    cut = prompt_of(http, messages, truncate_prompt_tokens=17)
    assert cut == b"\xfe" + "ñ\n\nAssistant: ".encode()  # 16 bytes: half a character is left out
    assert len(prompt_of(http, messages, truncate_prompt_tokens=-1)) in (503, 504)
    answer = ask(http, prompt_logprobs=1, n=2).json()
    first, *entries = answer["prompt_logprobs"]
    assert first is None
    assert len(entries) == len(PROMPT) - 1
    assert all(str(byte) in entry for byte, entry in zip(PROMPT[1:], entries, strict=True))
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])


def test_sampling_is_that_of_completions(http: httpx.Client) -> None:
    answer = ask(http, max_tokens=100, stop_token_ids=[108], min_tokens=1, logit_bias={"65": -1}, priority=2)
    assert answer.status_code == 200
    assert "x-ignored-params" not in answer.headers


def test_a_failed_row_says_why(http: httpx.Client) -> None:
    answer = ask(http, [{"role": "user", "content": "!nan"}]).json()["choices"][0]
    assert (answer["finish_reason"], answer["error"]) == ("error", "a logit is not a number")


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_says_the_role_first_and_adds_up(http: httpx.Client) -> None:
    options = {"n": 2, "seed": 3, "temperature": 1, "max_tokens": 20, "logprobs": True, "top_logprobs": 1}
    extra = {"return_chunks": True, "return_token_ids": True}
    messages = [{"role": "user", "content": "añ日🙂"}]
    whole = ask(http, messages, **options, **extra).json()
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *told, last = events(ask(http, messages, **options, **extra, **stream).text)
    assert {item["object"] for item in (*told, last)} == {"chat.completion.chunk"}
    assert len({item["id"] for item in (*told, last)}) == 1
    assert all(item["usage"] is None and len(item["choices"]) == 1 for item in told)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        mine = [item["choices"][0] for item in told if item["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert (mine[0]["logprobs"], mine[0]["finish_reason"]) == (None, None)
        assert all("role" not in item["delta"] for item in mine[1:])
        assert "".join(item["delta"].get("content", "") for item in mine) == choice["message"]["content"]
        assert [item["finish_reason"] for item in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert (
            list(chain.from_iterable(item["logprobs"]["content"] for item in mine[1:])) == choice["logprobs"]["content"]
        )
        for name in ("chunks", "token_ids"):
            assert list(chain.from_iterable(item[name] for item in mine[1:])) == choice[name]


def test_usage_can_be_told_as_it_grows(http: httpx.Client) -> None:
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    told = events(ask(http, **options).text)
    counts = [item["usage"]["completion_tokens"] for item in told]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_an_engine_that_fails_ends_a_stream_with_an_error(serve_in_thread: Callable[..., Running]) -> None:
    with serve_in_thread().client() as client:
        told = events(ask(client, [{"role": "user", "content": "!crash"}], stream=True).text)
        assert told[-1]["error"]["code"] == "engine_failed"


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": HELLO * 4097}, "messages"),
        ({"messages": ["Hello"]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages.1"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 512}]}, "messages"),
        ({"add_generation_prompt": 1}, "add_generation_prompt"),
        ({"continue_final_message": "yes"}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 512}, "max_completion_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 257}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": 3}, "temperature"),
        ({"n": 129}, "n"),
        ({"stop": 5}, "stop"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, options: dict[str, Any], param: str) -> None:
    answer = http.post(ROUTE, json={"messages": HELLO, "max_tokens": 8, **options})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "x" * 10_000, "é{\n}"])
def test_parts_that_are_no_text_are_named(http: httpx.Client, kind: str) -> None:
    parts = [{"type": "text", "text": "See:"}, {"type": kind, kind: {"url": "data:,"}}]
    error = error_of(ask(http, [*HELLO, {"role": "user", "content": parts}]), 400, None)
    assert error["param"] == "messages.1.content"
    assert error["message"].startswith("messages.1.content[1] is of type ")
    assert len(error["message"]) < 200
    assert "\n" not in error["message"]


USED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "parallel_tool_calls": 1,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "flex",
    "moderation": {},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "include_reasoning": 1,
    "return_prompt_text": True,
    "media_io_kwargs": {"video": {}},
    "chat_template": "x",
    "documents": [{}],
    "echo": True,
    "best_of": 2,
    "mm_processor_kwargs": {"a": 1},
}


@pytest.mark.parametrize("name", sorted(USED))
def test_what_is_known_and_not_supported_is_named(http: httpx.Client, name: str) -> None:
    error = error_of(ask(http, **{name: USED[name]}), 400, "unsupported_parameter")
    assert error["param"] == name


def test_every_such_parameter_of_a_chat_is_tried() -> None:
    assert set(ChatRequest.unsupported) - set(GenerationRequest.unsupported) <= set(USED)


def test_values_that_ask_for_nothing_are_accepted(http: httpx.Client) -> None:
    harmless: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "functions": [],
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
        "metadata": {},
        "service_tier": "auto",
        "audio": None,
        "echo": False,
        "prompt_cache_retention": "in_memory",
        "include_reasoning": False,
        "return_prompt_text": False,
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "mine",
    }
    answer = ask(http, **harmless)
    assert answer.status_code == 200, answer.text
    assert "x-ignored-params" not in answer.headers


def test_what_nobody_knows_is_ignored_and_named(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x", "mood": "good"}]
    answer = ask(http, messages, nobody=1, chat_template_kwargs={"thinking": True})
    assert answer.headers["x-ignored-params"] == "nobody, messages[0].mood, chat_template_kwargs.thinking"


def test_an_unknown_model_a_wrong_method_and_no_key(
    http: httpx.Client, serve_in_thread: Callable[..., Running]
) -> None:
    error_of(ask(http, model="gpt-4"), 404, "model_not_found")
    error_of(http.get(ROUTE), 405, "method_not_allowed")
    with serve_in_thread(settings={"api_key": ["k"]}).client() as client:
        error_of(ask(client), 401, "invalid_api_key")


# ── a model's own template ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def templated(tmp_path: Path, serve_in_thread: Callable[..., Running]) -> Callable[[str], httpx.Client]:
    """A client of a server whose model directory holds this template."""

    def start(source: str) -> httpx.Client:
        (tmp_path / "chat_template.jinja").write_text(source)
        return serve_in_thread(settings={"model": str(tmp_path)}).client()

    return start


def test_a_template_of_the_model_makes_the_prompt(templated: Callable[[str], httpx.Client]) -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{{ mood }}"
    with templated(source) as client:
        assert prompt_of(client) == b"\xfe[user]Hello\xff"
        answer = ask(client, chat_template_kwargs={"mood": "good"}, return_token_ids=True)
        assert bytes(answer.json()["choices"][0]["prompt_token_ids"]) == b"\xfe[user]Hello\xffgood"
        assert "x-ignored-params" not in answer.headers
        tokens = client.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
        assert bytes(tokens) == b"\xfe[user]Hello\xff"
        continued = prompt_of(client, [*HELLO, {"role": "assistant", "content": "Hi"}], continue_final_message=True)
        assert continued == b"\xfe[user]Hello\xff[assistant]Hi"


def test_bos_is_put_before_a_template_that_has_none(templated: Callable[[str], httpx.Client]) -> None:
    with templated("{{ messages[0].content }}") as client:
        assert prompt_of(client) == b"\xfeHello"
        assert prompt_of(client, add_special_tokens=False) == b"Hello"
        error = error_of(ask(client, [{"role": "user", "content": ""}], add_special_tokens=False), 400, None)
        assert error["param"] == "messages"


def test_without_a_limit_the_context_is_the_limit(templated: Callable[[str], httpx.Client]) -> None:
    with templated("{{ messages[0].content }}") as client:
        answer = ask(client, max_tokens=None).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["message"]["content"] == expected(b"\xfeHello", 506).decode()
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_template_may_refuse_and_says_where(templated: Callable[[str], httpx.Client]) -> None:
    with templated(
        "{% if messages | length > 1 %}\n{{ raise_exception('one message alone') }}\n{% endif %}x"
    ) as client:
        assert ask(client).status_code == 200
        error = error_of(ask(client, HELLO * 2), 400, "chat_template_error")
        assert error["param"] == "messages"
        assert error["message"] == "messages: the chat template: chat_template.jinja: line 2: one message alone"
        error_of(client.post("/tokenize", json={"messages": HELLO * 2}), 400, "chat_template_error")


def test_a_hostile_template_leaves_the_rest_of_the_server_alone(templated: Callable[[str], httpx.Client]) -> None:
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with templated(loops) as client:
        error = error_of(ask(client), 400, "chat_template_error")
        assert "took more than" in error["message"]
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_broken_template_refuses_chats_alone(templated: Callable[[str], httpx.Client], tmp_path: Path) -> None:
    with templated("{% if %}") as client:
        error = error_of(ask(client), 400, "chat_template_error")
        assert "chat_template.jinja: line 1: " in error["message"]
        assert str(tmp_path) not in error["message"]
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
