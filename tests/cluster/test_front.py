from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from answers import events, expected, samples, wait_for
from local_cluster import Cluster

from server.cluster.front import prompt_of

SLOW = 0.02  # seconds a tick: time to do something while a stream runs
PROMPT = (
    "a prompt that is long enough to fill two blocks of sixty-four bytes, and then some more of it to be sure of it all"
)


def stream_of(client: httpx.Client, prompt: str = PROMPT, max_tokens: int = 200) -> Any:
    fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return client.stream("POST", "/v1/completions", json=fields)


def live(cluster: Cluster) -> float:
    with cluster.client() as client:
        found = samples(client.get("/metrics").text)
    return sum(value for name, value in found.items() if name.startswith("hnet_num_requests_running"))


def test_an_answer_is_what_a_server_alone_gives(cluster: Callable[..., Cluster]) -> None:
    client = cluster("a", "b").client()
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 20, "temperature": 0})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"].encode() == expected(PROMPT.encode(), 20)
    assert answer.headers["x-hnet-replica"] in ("a", "b")
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_streams_come_event_by_event_to_the_openai_client(cluster: Callable[..., Cluster]) -> None:
    with openai.OpenAI(base_url=f"{cluster('a', 'b', tick_seconds=SLOW).url}/v1", api_key="-") as client:
        chunks = list(client.completions.create(model="fake", prompt=PROMPT, max_tokens=30, temperature=0, stream=True))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text.encode() == expected(PROMPT.encode(), 30)
    assert len(chunks) > 3


def test_every_route_is_the_replicas_own(cluster: Callable[..., Cluster]) -> None:
    client = cluster("a").client()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/v1/models").json()["data"][0]["object"] == "model"
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
    missing = client.get("/nothing?here")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    wrong = client.post("/v1/completions", content=b"{")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_request_id_is_one_from_end_to_end(cluster: Callable[..., Cluster]) -> None:
    client = cluster("a").client()
    answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"


def test_keys_are_asked_for_by_the_replicas(cluster: Callable[..., Cluster]) -> None:
    client = cluster("a", "b", settings={"api_key": ("secret",)}).client()
    for path in ("/v1/models", "/metrics"):
        refused = client.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get(path, headers={"authorization": "Bearer secret"}).status_code == 200


def test_too_large_a_body_is_refused_at_the_front(cluster: Callable[..., Cluster]) -> None:
    running = cluster("a", settings={"max_body_bytes": 1000})
    client = running.client()
    declared = client.post("/v1/completions", content=b"x" * 1001)

    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 600] * 2

    for answer in (declared, client.post("/v1/completions", content=pieces())):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert running.replicas.calls == []


def test_prompts_with_the_same_beginning_meet_and_others_spread(cluster: Callable[..., Cluster]) -> None:
    client = cluster("a", "b").client()

    def replica(prompt: str) -> str:
        return client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).headers["x-hnet-replica"]

    first, second = replica(PROMPT), replica("?" * 200)
    assert first != second
    assert [replica(PROMPT + str(n)) for n in range(3)] == [first] * 3
    assert replica("?" * 200 + "!") == second


def test_a_stream_whose_replica_is_lost_ends_with_an_error_event(cluster: Callable[..., Cluster]) -> None:
    running = cluster("a", "b", tick_seconds=SLOW)
    with running.client() as client, stream_of(client) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        running.kill(response.headers["x-hnet-replica"])
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    text = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in rest[:-2])
    assert text.encode() in expected(PROMPT.encode(), 200)
    assert running.metrics.lost._value.get() == 1


def test_what_has_not_begun_is_answered_by_another_replica(cluster: Callable[..., Cluster]) -> None:
    running = cluster("a", "b", tick_seconds=SLOW)
    answers = []

    def ask() -> None:
        with running.client() as client:
            answers.append(client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 50, "temperature": 0}))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: running.replicas.calls)
    lost = running.replicas.calls[0][0]
    running.kill(lost)
    asking.join(20)
    (answer,) = answers
    assert answer.json()["choices"][0]["text"].encode() == expected(PROMPT.encode(), 50)
    assert answer.headers["x-hnet-replica"] != lost
    assert running.metrics.repeated._value.get() == 1


def test_without_a_replica_the_answer_is_503(cluster: Callable[..., Cluster]) -> None:
    running = cluster("a")
    running.kill("a")
    with running.client() as client:
        wait_for(lambda: client.get("/ready").status_code == 503)
        answer = client.post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_ends_its_request(cluster: Callable[..., Cluster], is_stream: bool) -> None:
    running = cluster("a", tick_seconds=SLOW)
    with running.client() as client:
        if is_stream:
            with stream_of(client, max_tokens=300) as response:
                lines = response.iter_lines()  # kept: the response is closed with it
                next(lines)
                wait_for(lambda: live(running) == 1)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={"prompt": "x", "max_tokens": 400}, timeout=0.3)
    wait_for(lambda: live(running) == 0, 5)
    wait_for(lambda: running.replicas.left == 1)


def test_metrics_are_every_replicas_with_its_name(cluster: Callable[..., Cluster]) -> None:
    running = cluster("a", "b")
    client = running.client()
    for n in range(3):
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1 + n})
    reply = client.get("/metrics")
    found = samples(reply.text)
    generated = {name: value for name, value in found.items() if name.startswith("hnet_generation_bytes_total")}
    assert {name.rpartition("replica=")[2] for name in generated} == {'"a"}', '"b"}'}
    assert sum(generated.values()) == 6
    assert found['hnet_front_repeated_total{replica="front-1"}'] == 0
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.text.count("# TYPE hnet_generation_bytes_total counter") == 1


def test_the_engine_failing_is_told_as_by_a_server_alone(cluster: Callable[..., Cluster]) -> None:
    client = cluster("a").client()
    answer = client.post("/v1/completions", json={"prompt": "!crash", "max_tokens": 9})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "tëxt"}, "tëxt".encode()),
        ({"prompt": list("tëxt".encode())}, "tëxt".encode()),
        ({"prompt": ["one", "two"]}, b"one"),
        ({"prompt": [[97, 98], [99]]}, b"ab"),
        ({"prompt": "text", "cache_salt": "salt"}, b"salttext"),
        ({"messages": [{"role": "user", "content": "hi"}]}, b"user\0hi"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, b"user\0hi"),
        ({"prompt": [97, -1, 256, True, "x"]}, b"a\x01"),
        ({"prompt": [[]]}, b""),
        ({"prompt": [[[97]]]}, b"a"),
        ({"prompt": 5}, b""),
        ({"messages": [5, None]}, b""),
        ({"input": "text"}, b""),
        ([], b""),
    ],
)
def test_the_prompt_is_found_in_a_body(fields: Any, prompt: bytes) -> None:
    assert prompt_of(json.dumps(fields).encode()) == prompt


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"[" * 5000])
def test_a_body_that_is_no_request_has_no_prompt(body: bytes) -> None:
    assert prompt_of(body) == b""


def test_events_of_a_whole_stream_end_with_done(cluster: Callable[..., Cluster]) -> None:
    with cluster("a").client() as client, stream_of(client, max_tokens=9) as response:
        text = response.read().decode()
    assert "".join(each["choices"][0]["text"] for each in events(text)).encode() == expected(PROMPT.encode(), 9)
