"""Structured output over HTTP: what may be asked for, what is said of what cannot be, and who pays for hostile ones."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from conftest import ServerProcess
from jsonschema import validate
from pydantic import BaseModel

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def http_demo(demo: ServerProcess) -> Any:
    with demo.client(timeout=60) as client:
        yield client


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "A city: ", "max_tokens": 120, "seed": 3, **body})


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"]
    return text


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "\n?"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}},
    ],
)
def test_json_by_a_schema(http_demo: httpx.Client, body: dict[str, Any]) -> None:
    text = text_of(complete(http_demo, **body))
    validate(json.loads(text), SCHEMA)
    if "disable_any_whitespace" in body.get("structured_outputs", {}):
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


def test_the_other_ways(http_demo: httpx.Client) -> None:
    assert re.fullmatch("[0-9]{3}", text_of(complete(http_demo, structured_outputs={"regex": "^[0-9]{3}$"})))
    assert text_of(complete(http_demo, structured_outputs={"choice": ["yes", "né"]})) in ("yes", "né")
    grammar = 'root ::= "no" | "a" root "b"'
    assert re.fullmatch("a*nob*", text_of(complete(http_demo, structured_outputs={"grammar": grammar})))
    for body in ({"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}):
        bias = {str(byte): 6 for byte in b'"}'}
        assert isinstance(json.loads(text_of(complete(http_demo, logit_bias=bias, **body))), dict)
    closed = {"json": {"properties": {"a": {"const": 1}}, "type": "object"}, "disable_additional_properties": True}
    assert json.loads(text_of(complete(http_demo, structured_outputs=closed))) in ({}, {"a": 1})
    assert complete(http_demo, response_format={"type": "text"}).status_code == 200


def test_streams_choices_and_batches_are_held_to_it_too(http_demo: httpx.Client) -> None:
    body = {"prompt": ["One: ", "Two: "], "n": 3, "structured_outputs": {"regex": "(red|green) [0-9]{2}"}}
    whole = complete(http_demo, **body).json()["choices"]
    assert len(whole) == 6
    assert all(re.fullmatch("(red|green) [0-9]{2}", choice["text"]) for choice in whole)
    streamed: dict[int, str] = {}
    with http_demo.stream(
        "POST", "/v1/completions", json={"seed": 3, "max_tokens": 120, "stream": True, **body}
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert streamed == {choice["index"]: choice["text"] for choice in whole}


def test_the_official_client_parses_a_chat_into_a_model(demo: ServerProcess) -> None:
    class Answer(BaseModel):
        colour: Literal["red", "green"]
        number: int

    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.parse(
            model="demo",
            messages=[{"role": "user", "content": "Choose."}],
            response_format=Answer,
            max_completion_tokens=200,
            seed=1,
        )
    assert isinstance(answer.choices[0].message.parsed, Answer)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"structured_outputs": {"json": {"properties": {"a": {"not": {}}}}}}, "structured_outputs.json", '"not"'),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json", "uniqueItems"),
        ({"structured_outputs": {"json": {"minProperties": 2}}}, "structured_outputs.json", "minProperties"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "Expecting"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "object"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-ahead"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "string"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex", "surrogate"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": ["a"] * 2000}}, "structured_outputs.choice", "at most 1024"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "json and regex"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": []}, "structured_outputs", ""),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "required"),
        ({"response_format": "json"}, "response_format", ""),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "beside",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"if": {}}}}},
            "response_format.json_schema.schema",
            '"if"',
        ),
        ({"guided_json": {}}, "guided_json", "structured_outputs.json"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_what_cannot_be_is_a_400_that_names_it(
    http_demo: httpx.Client, route: str, body: dict[str, Any], param: str, words: str
) -> None:
    if route.endswith("chat/completions"):
        body = {"messages": [{"role": "user", "content": "Hi"}], **body}
    answer = http_demo.post(route, content=json.dumps({"prompt": "x", **body}))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["message"].startswith(f"{param}: ")


def test_a_prompt_that_ends_inside_a_character_is_named(http_demo: httpx.Client) -> None:
    answer = complete(http_demo, prompt=[254, 195], structured_outputs={"regex": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert "inside a character" in answer.json()["error"]["message"]


def test_names_nobody_knows_are_told(http_demo: httpx.Client) -> None:
    answer = complete(http_demo, structured_outputs={"regex": "a", "backend": "x", "json": None})
    assert answer.headers["x-ignored-params"] == "structured_outputs.backend"


HOSTILE: list[dict[str, Any]] = [
    {"regex": "((((a{99}){99}){99}){99})"},
    {"regex": "[ab]*a[ab]{5000}"},
    {"regex": "(a?){20000}a{20000}"},
    {"regex": "(" * 30000},
    {"grammar": "start: " + "(" * 30000 + '"a"' + ")" * 30000},
    {"grammar": "start: a\n" + "\n".join(f"{chr(97 + i)}: {chr(98 + i)}{{99}}" for i in range(20))},
    {
        "json": json.dumps(
            {"type": "object", "properties": {f"p{i}": {"pattern": "a{500}", "type": "string"} for i in range(900)}}
        )
    },
    {"json": '{"items":' * 3000 + "{}" + "}" * 3000},
    {"json": {"type": "string", "pattern": "(a{1000}){1000}"}},
    {"choice": [f"{i:060}" for i in range(1000)]},
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_a_hostile_constraint_is_refused_or_served_within_bounds(http_demo: httpx.Client, index: int) -> None:
    answer = complete(http_demo, structured_outputs=HOSTILE[index], max_tokens=8)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].startswith("structured_outputs.")
        assert len(answer.text) < 2000


def test_hostile_constraints_cost_their_sender_alone(http_demo: httpx.Client) -> None:
    """While they come, a plain completion has every byte that it has alone, and small constraints are served."""
    plain = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0}
    expected = http_demo.post("/v1/completions", json=plain).json()["choices"][0]["text"]
    ambiguous = {"grammar": 'start: a\na: a a | "x" | a a a'}
    with ThreadPoolExecutor(8) as pool:
        attacks = [
            pool.submit(complete, http_demo, structured_outputs={"regex": f"(((a{{9{i}}}){{99}}){{99}})"}, max_tokens=4)
            for i in range(2)
        ]
        attacks += [
            pool.submit(complete, http_demo, structured_outputs=ambiguous, max_tokens=150, logit_bias={"255": -100})
            for _ in range(2)
        ]
        time.sleep(0.2)
        assert http_demo.post("/v1/completions", json=plain).json()["choices"][0]["text"] == expected
        answers = [attack.result() for attack in attacks]
    assert {answer.status_code for answer in answers} <= {200, 400, 429, 500}
    for answer in answers[2:]:
        assert answer.json()["choices"][0]["finish_reason"] in ("error", "length")
    assert text_of(complete(http_demo, structured_outputs={"choice": ["yes"]})) == "yes"
