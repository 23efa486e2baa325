"""What goes wrong, and what a client leaves early, as OpenAI's own client sees it: a real server process, one row."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from answers import expected, samples, wait_for
from conftest import ServerProcess, end_process, start_process

KEY = "the key"
LONG: Any = {"model": "fake", "prompt": "abc", "max_tokens": 4000}  # far longer than a test takes
ABORTED = 'hnet_request_finished_total{reason="abort"}'


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    settings = {"api_key": [KEY], "metrics_public": True, "max_body_bytes": 20_000, "max_waiting_requests": 0}
    server = start_process(settings, max_num_seqs=1, max_model_len=8192, tick_seconds=0.01)
    yield server
    end_process(server)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def metrics(server: ServerProcess) -> dict[str, float]:
    with server.client() as http:
        return samples(http.get("/metrics").text)


@pytest.fixture
def aborts(server: ServerProcess) -> Iterator[list[float]]:
    """The requests aborted before the test; by its end one more is, and no row is in use."""
    before = metrics(server)[ABORTED]
    yield [before]
    wait_for(lambda: metrics(server)["hnet_num_requests_running"] == 0)
    assert metrics(server)[ABORTED] == before + 1


@pytest.mark.parametrize(
    ("options", "kind", "status", "code", "param"),
    [
        ({"temperature": 9}, openai.BadRequestError, 400, None, "temperature"),
        ({"suffix": "y"}, openai.BadRequestError, 400, "unsupported_parameter", "suffix"),
        ({"extra_body": {"utf8": "loose"}}, openai.BadRequestError, 400, None, "utf8"),
        ({"model": "gpt-4"}, openai.NotFoundError, 404, "model_not_found", "model"),
        ({"prompt": "x" * 30_000}, openai.APIStatusError, 413, "body_too_large", None),
        ({"n": 2}, openai.RateLimitError, 429, "slow_down", None),
    ],
)
def test_a_refusal_is_the_clients_own_exception(
    client: openai.OpenAI,
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "fake", "prompt": "x", **options})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI) -> None:
    stranger = client.with_options(api_key="another")
    for ask in (stranger.models.list, lambda: stranger.completions.create(model="fake", prompt="x")):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask()
        assert caught.value.code == "invalid_api_key"


def test_the_clients_retries_wait_as_long_as_they_are_told(
    client: openai.OpenAI, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    slept: list[float] = []
    sleep = time.sleep
    patient = openai.OpenAI(
        base_url=client.base_url,
        api_key=KEY,
        max_retries=20,
        http_client=openai.DefaultHttpxClient(
            event_hooks={"response": [lambda answer: told.append(float(answer.headers.get("retry-after-ms", 0)))]}
        ),
    )
    busy = client.completions.create(model="fake", prompt="abc", max_tokens=100, stream=True)
    wait_for(lambda: metrics(server)["hnet_num_requests_running"] == 1)
    with monkeypatch.context() as patch, patient:
        patch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))
        answer = patient.completions.create(model="fake", prompt="abc", max_tokens=4, temperature=0)
    assert answer.choices[0].text.encode() == expected(b"abc", 4)
    assert slept == [milliseconds / 1000 for milliseconds in told[:-1]] != []
    assert len("".join(event.choices[0].text for event in busy)) == 100  # nobody else was harmed


def test_a_client_that_gives_up_waiting_frees_its_row(client: openai.OpenAI, aborts: list[float]) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**LONG)


def test_a_stream_that_is_closed_frees_its_row(client: openai.OpenAI, aborts: list[float]) -> None:
    with client.completions.create(**LONG, stream=True) as stream:
        next(stream)


async def test_a_chat_that_an_asynchronous_client_leaves_frees_its_row(
    server: ServerProcess, aborts: list[float]
) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=20) as client,
        client.chat.completions.stream(model="fake", messages=messages) as stream,
    ):
        async for event in stream:
            if event.type == "content.delta":
                break


def test_a_server_that_shuts_down_is_an_error_for_who_comes_and_for_who_stays(
    serve_process: Callable[..., ServerProcess],
) -> None:
    server = serve_process(settings={"drain_timeout": 2}, max_model_len=8192, tick_seconds=0.02)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with server.client() as http:
            wait_for(lambda: http.get("/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="fake", prompt="x")
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        with pytest.raises(openai.APIError, match="shutting down") as ended:
            list(stream)
        assert ended.value.code == "shutting_down"


def test_a_request_that_outlasts_its_time_is_not_repeated(serve_process: Callable[..., ServerProcess]) -> None:
    server = serve_process(settings={"request_timeout": 0.5}, max_model_len=8192, tick_seconds=0.02)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5, timeout=20) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(**LONG)
    assert (caught.value.status_code, caught.value.code) == (504, "request_timeout")
    wait_for(lambda: metrics(server)[ABORTED] == 1)
    assert metrics(server)["hnet_time_to_first_byte_seconds_count"] == 1  # of one request in all
