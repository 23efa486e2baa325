"""Requests that are meant to hurt: bounded, refused or slow for their sender alone.

Beside each of them a client that behaves is streamed to, and gets the very bytes that it gets alone.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import events, samples, wait_for
from conftest import ServerProcess

MUCH = 100_000
SHORT = {"prompt": "a", "max_tokens": 2}


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


HOSTILE: dict[str, tuple[str, str | None]] = {  # what it is → the body, and the parameter that the answer names
    "stop strings": (json.dumps({**SHORT, "stop": ["x"] * MUCH}), "stop"),
    "bad words": (json.dumps({**SHORT, "bad_words": ["x"] * MUCH}), "bad_words"),
    "a long stop string": (json.dumps({**SHORT, "stop": "x" * 20 * MUCH}), "stop"),
    "biases": (json.dumps({**SHORT, "logit_bias": {str(key): 1 for key in range(MUCH)}}), "logit_bias"),
    "a bias without end": (json.dumps({**SHORT, "logit_bias": {"1" * 20 * MUCH: 1}}), "logit_bias"),
    "allowed bytes": (json.dumps({**SHORT, "allowed_token_ids": [*range(256), *[256] * MUCH]}), "allowed_token_ids"),
    "digits": ('{"prompt": "a", "seed": ' + "1" * MUCH + "}", None),
    "digits of a fraction": ('{"prompt": "a", "n": 1.' + "1" * MUCH + "}", "n"),
    "an exponent": ('{"prompt": "a", "temperature": 1e999999}', "temperature"),
    "a large integer": (json.dumps({**SHORT, "max_tokens": 10**4000}), "max_tokens"),
    "a large integer for a byte": (json.dumps({"prompt": [10**4000]}), "prompt"),
    "deep lists": ('{"prompt": ' + nested("[", "]", MUCH) + "}", None),
    "deep objects": (nested('{"a": ', "}", MUCH), None),
    "a deep name that nobody knows": ('{"prompt": 5, "x": ' + nested("[", "]", 900) + "}", "prompt"),
    "keys that come twice": ("{" + '"prompt": "a", "max_tokens": 2, ' * MUCH + '"prompt": 5}', "prompt"),
    "a long text": (json.dumps({**SHORT, "prompt": "x" * 30 * MUCH}), "prompt"),
    "many ids": (json.dumps({**SHORT, "prompt": [120] * 8 * MUCH}), "prompt"),
    "many texts": (json.dumps({**SHORT, "prompt": ["x"] * MUCH}), "prompt"),
    "a long model name": (json.dumps({**SHORT, "model": "x" * 20 * MUCH}), "model"),
    "a long request id": (json.dumps({**SHORT, "request_id": "x" * 20 * MUCH}), "request_id"),
    "numbers in the answer": (json.dumps({**SHORT, "n": 128, "logprobs": 256, "max_tokens": 8000}), "logprobs"),
    "choices": (json.dumps({**SHORT, "n": 10**9}), "n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_much_is_refused_in_a_few_words(demo: ServerProcess, name: str) -> None:
    body, param = HOSTILE[name]
    with demo.client() as client:
        answer = client.post("/v1/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404 if param == "model" else 400, param)
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    "extra",
    [
        {f"name {number}": number for number in range(MUCH)},
        {"x" * 20 * MUCH: 1},
        {"\r\nset-cookie: x": 1, "é\ud800\0": 2},
        {"user": "x" * 20 * MUCH},
    ],
    ids=["many names", "a long name", "names that are no header", "a long user"],
)
def test_what_nobody_knows_costs_nothing(demo: ServerProcess, extra: dict[str, Any]) -> None:
    with demo.client() as client:
        answer = client.post("/v1/completions", content=json.dumps({**SHORT, **extra}))
    assert answer.status_code == 200
    assert len(answer.headers.get("x-ignored-params", "")) <= 1024
    assert "set-cookie" not in answer.headers


def test_a_long_target_is_not_said_again_in_full(demo: ServerProcess) -> None:
    with demo.client() as client:
        for path in ("/" + "x" * 60_000, "/v1/models/" + "x" * 60_000):
            answer = client.get(path)
            assert answer.status_code == 404
            assert len(answer.content) < 2000


# Beside them


def odd_prompts(client: httpx.Client, number: int) -> None:
    """A text that every other byte opens a chunk of, the most that this model does, and noise; each in many rows."""
    noise = list(random.Random(number).randbytes(300))
    body = {"prompt": [list(b" a" * 150), noise], "n": 8, "max_tokens": 100, "utf8": "raw", "ignore_eos": True}
    usage = client.post("/v1/completions", json={**body, "temperature": 2, "cache_salt": f"{number}"}).json()["usage"]
    assert usage["completion_tokens"] == 1600
    assert usage["completion_tokens_details"]["chunks"][0] > 8 * (140 + 80)


def numbers(client: httpx.Client, number: int) -> None:
    """As many choices and log-probabilities as an answer may have."""
    body = {**SHORT, "n": 128, "logprobs": 256, "max_tokens": 64, "seed": number}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.content.count(b'"index":') == 128


def refused_bodies(client: httpx.Client, number: int) -> None:
    """Bodies of many megabytes that are wrong."""
    body, _ = list(HOSTILE.values())[number % len(HOSTILE)]
    assert client.post("/v1/completions", content=body).status_code in (400, 404)


def templates(client: httpx.Client, number: int) -> None:
    """Conversations for which the operator's template takes as long as it is let."""
    body = {"messages": [{"role": "user", "content": "{{ 1 / 0 }}{% for %}"}], "max_tokens": 2}
    answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) in (
        (400, "chat_template_error"),
        (429, "slow_down"),
    )


@contextmanager
def abused(server: ServerProcess, abuse: Callable[[httpx.Client, int], None], senders: int = 2) -> Iterator[None]:
    """While this lasts, `abuse` is done again and again; what it finds wrong fails the test."""
    done = threading.Event()
    begun: list[int] = []
    wrong: list[BaseException] = []

    def send(first: int) -> None:
        try:
            with server.client(timeout=60) as client:
                number = first
                while not done.is_set():
                    begun.append(number)
                    abuse(client, number)
                    number += senders
        except (AssertionError, httpx.HTTPError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=send, args=(first,)) for first in range(senders)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(begun) >= senders)
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(90)
    assert not wrong, wrong
    assert not any(thread.is_alive() for thread in threads)


def streamed(client: httpx.Client) -> list[str]:
    """What a client that behaves gets: a greedy stream and one with a seed."""
    texts = []
    for options in ({"temperature": 0}, {"temperature": 1, "seed": 7}):
        body = {"prompt": "The little dog said", "max_tokens": 60, "ignore_eos": True, "stream": True, **options}
        answer = client.post("/v1/completions", json=body, timeout=60)
        texts.append("".join(event["choices"][0]["text"] for event in events(answer.text)))
    return texts


@pytest.mark.parametrize(("abuse", "senders"), [(odd_prompts, 3), (numbers, 1), (refused_bodies, 2)])
def test_a_stream_beside_abuse_is_the_stream_alone(
    demo: ServerProcess, abuse: Callable[[httpx.Client, int], None], senders: int
) -> None:
    with demo.client() as client:
        alone = streamed(client)
        with abused(demo, abuse, senders):
            assert streamed(client) == alone
        wait_for(lambda: samples(client.get("/metrics").text)["hnet_num_requests_running"] == 0)
        assert samples(client.get("/metrics").text)["hnet_engine_restarts_total"] == 0


def test_a_stream_beside_a_hostile_template_is_the_stream_alone(
    tmp_path: Path, serve_process: Callable[..., ServerProcess]
) -> None:
    template = tmp_path / "hostile.jinja"
    template.write_text("{% for a in range(90000) %}{% for b in range(90000) %}{{ messages }}{% endfor %}{% endfor %}")
    constants = {"server.chat_templates.RENDER_SECONDS": 0.5}
    server = serve_process({"chat_template": str(template)}, tick_seconds=0.005, constants=constants)
    with server.client() as client:
        alone = streamed(client)
        with abused(server, templates):
            assert streamed(client) == alone
