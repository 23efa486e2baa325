"""The official client's chats against a real server process: on the fake engine, and `hnet serve` on the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from conftest import ServerProcess, end_process, start_process

HELLO: Any = [{"role": "user", "content": "Hello, wörld"}]
PROMPT = "User: Hello, wörld\n\nAssistant: "


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = start_process()
    yield f"{server.url}/v1"
    end_process(server)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_whole_chat_a_streamed_one_and_an_error(client: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "messages": HELLO, "temperature": 0, "max_completion_tokens": 15}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", PROMPT[:14], "length")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(item.bytes or []) for item in choice.logprobs.content) == PROMPT.encode()[:15]
    assert all(len(item.top_logprobs) == 3 for item in choice.logprobs.content)
    assert whole.usage is not None
    assert whole.usage.total_tokens == 1 + len(PROMPT.encode()) + 15

    text, usage, roles = "", None, []
    for event in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for item in event.choices:
            text += item.delta.content or ""
            roles.append(item.delta.role)
        usage = event.usage or usage
    assert text == choice.message.content
    assert (roles[0], set(roles[1:])) == ("assistant", {None})
    assert usage is not None
    assert usage.completion_tokens == 15

    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


def test_the_clients_own_collector_of_streams_understands_them(client: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "messages": HELLO, "temperature": 0, "stop": ["H"]}
    with client.chat.completions.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert final.choices[0].message.content == PROMPT[:6] == "User: "


async def test_the_asynchronous_client_streams_too(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="fake", messages=HELLO, temperature=0, max_tokens=11, stream=True
        )
        assert "".join([event.choices[0].delta.content or "" async for event in stream]) == PROMPT[:11]


def test_the_demo_model_talks_through_hnet_serve(demo: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        options: Any = {"model": "demo", "messages": HELLO, "max_tokens": 40, "seed": 4}
        whole = client.chat.completions.create(**options)
        prompted = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, seed=4)
        stream = client.chat.completions.create(**options, stream=True)
        streamed = "".join(event.choices[0].delta.content or "" for event in stream)
        content = whole.choices[0].message.content
        assert content
        assert prompted.choices[0].text.startswith(content)
        assert streamed == content
