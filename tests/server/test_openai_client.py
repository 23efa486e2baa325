"""The official client against the server, on the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from answers import expected
from conftest import Running


@pytest.fixture(scope="module")
def client(shared: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_whole_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="fake", prompt="Hello", temperature=0, max_tokens=10, logprobs=2, echo=True
    )
    (choice,) = answer.choices
    assert choice.text == "HelloHelloHello"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[:2] == ["\\xfe", "H"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 10)


def test_a_streamed_completion_with_usage(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="fake",
        prompt="añ",
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    text, data, usage = "", b"", None
    for event in stream:
        for choice in event.choices:
            text += choice.text
            data += bytes(choice.model_extra["token_ids"] if choice.model_extra else [])
        usage = event.usage or usage
    assert data == expected("añ".encode(), 30)
    assert text.encode() == data
    assert usage is not None
    assert usage.completion_tokens == 30


@pytest.mark.parametrize("prompt", ["abcdef", ["abcdef", "xyz"]])
def test_choices_in_a_stream_are_those_of_the_whole(client: openai.OpenAI, prompt: str | list[str]) -> None:
    options: Any = {"model": "fake", "prompt": prompt, "n": 3, "seed": 5, "max_tokens": 12, "logprobs": 1}
    whole = client.completions.create(**options)
    texts = [""] * len(whole.choices)
    logprobs: list[list[float | None]] = [[] for _ in whole.choices]
    for event in client.completions.create(**options, stream=True):
        (choice,) = event.choices
        texts[choice.index] += choice.text
        logprobs[choice.index] += (choice.logprobs and choice.logprobs.token_logprobs) or []
    assert [choice.index for choice in whole.choices] == list(range(len(texts)))
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == len(texts)
    assert logprobs == [choice.logprobs and choice.logprobs.token_logprobs for choice in whole.choices]


async def test_the_asynchronous_client_streams_too(shared: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(model="fake", prompt="abc", temperature=0, max_tokens=9, stream=True)
        assert "".join([event.choices[0].text async for event in stream]) == "abcabcabc"


def test_errors_become_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x", suffix="y")
    assert caught.value.param == "suffix"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"


def test_models_can_be_listed_and_looked_up(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
