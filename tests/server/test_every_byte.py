"""Each of the 256 byte values, on each of its ways: as prompt id, in `token_ids`, `bytes` and the keys of
log-probabilities, as a stop, through server-sent events and as text. On the fake engine, which writes what it is told,
and on the demo model."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from answers import events, expected
from conftest import ServerProcess

ALL = bytes(range(256))
KEY = re.compile(r"\\x([0-9a-f]{2})|\\(\\)|([\x20-\x5b\x5d-\x7e])")


def byte_of(key: str) -> int:
    """The byte that a key of log-probabilities names; no two bytes have one in common."""
    match = KEY.fullmatch(key)
    assert match is not None, key
    number, backslash, character = match.groups()
    return int(number, 16) if number else ord(backslash or character)


def stream(client: httpx.Client, body: dict[str, Any]) -> list[Any]:
    """The choices of a stream's events. Nothing but the line feeds that end them is a control character in it, so that
    no reader takes one of the completion's for an end."""
    answer = client.post("/v1/completions", json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", answer.content)
    assert all(re.fullmatch(rb"data: .+", part) for part in answer.content.removesuffix(b"\n\n").split(b"\n\n"))
    return [event["choices"][0] for event in events(answer.text)]


@pytest.mark.parametrize("token_id_keys", [False, True])
@pytest.mark.parametrize("interval", [None, 1, 7])
def test_every_byte_comes_back_in_ids_bytes_keys_and_text(
    http: httpx.Client, interval: int | None, token_id_keys: bool
) -> None:
    """`interval`: of a stream's events; None is the whole answer."""
    body = {"prompt": list(ALL), "max_tokens": 256, "temperature": 0, "utf8": "raw", "logprobs": 256, "echo": True}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": token_id_keys, "ignore_eos": True}
    if interval is None:
        pieces = http.post("/v1/completions", json=body).json()["choices"]
    else:
        pieces = stream(http, {**body, "stream_interval": interval})
    wanted = ALL + expected(ALL, 256)
    assert pieces[0]["prompt_token_ids"] == list(ALL)
    assert bytes(byte for piece in pieces for byte in piece["token_ids"]) == wanted[256:]
    columns = {name: [item for piece in pieces for item in piece["logprobs"][name]] for name in pieces[0]["logprobs"]}
    assert bytes(columns["token_ids"]) == bytes(byte for (byte,) in columns["bytes"]) == wanted
    named = (lambda key: int(key.removeprefix("token_id:"))) if token_id_keys else byte_of
    assert bytes(map(named, columns["tokens"])) == wanted
    for top in columns["top_logprobs"][1:]:
        assert sorted(map(named, top)) == list(ALL)
    text = "".join(piece["text"] for piece in pieces)
    assert text == wanted.decode("utf-8", "replace")
    assert len(columns["text_offset"]) == len(wanted)
    assert columns["text_offset"] == sorted(columns["text_offset"])


def test_every_byte_is_a_prompt_a_completion_and_a_stop_of_the_demo_model(demo: ServerProcess) -> None:
    with demo.client() as client:
        for byte in ALL:
            body = {"prompt": [254, byte], "max_tokens": 2, "utf8": "raw", "ignore_eos": True, "logprobs": 0}
            body |= {"logit_bias": {str(byte): 100}, "temperature": 0, "return_token_ids": True}  # no other comes
            pieces = stream(client, body)
            assert pieces[0]["prompt_token_ids"] == body["prompt"]
            assert [item for piece in pieces for item in piece["token_ids"]] == [byte] * 2
            assert [byte_of(key) for piece in pieces for key in piece["logprobs"]["tokens"]] == [byte] * 2
            assert "".join(piece["text"] for piece in pieces) == bytes((byte, byte)).decode("utf-8", "replace")
            (piece,) = stream(client, {**body, "stop_token_ids": [byte]})
            assert (piece["text"], piece["token_ids"]) == ("", [])
            assert (piece["finish_reason"], piece["stop_reason"]) == ("stop", byte)


@pytest.mark.parametrize("mode", ["strict", "raw"])
def test_a_stop_is_found_wherever_events_part_it(demo: ServerProcess, mode: str) -> None:
    """Every pair and triple of what the model writes, as a stop; characters of several bytes and their parts too."""
    word = "né€"
    body: dict[str, Any] = {"prompt": word * 4, "max_tokens": 24, "temperature": 0, "utf8": mode, "ignore_eos": True}
    body |= {"allowed_token_ids": list(word.encode()), "stream_interval": 1}
    with demo.client() as client:
        free = "".join(piece["text"] for piece in stream(client, body))
        tried = set()
        for size in (1, 2, 3):
            for start in range(min(len(free) - size, 8)):
                stop = free[start : start + size]
                if "\ufffd" in stop:
                    continue
                tried.add(stop)
                pieces = stream(client, {**body, "stop": [stop]})
                assert "".join(piece["text"] for piece in pieces) == free[: free.index(stop)]
                assert pieces[-1]["stop_reason"] == stop
    assert len(tried) > 5
    assert not all(map(str.isascii, tried))
