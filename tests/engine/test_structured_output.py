"""Structured output through the whole engine: what is finished is valid, what cannot be enforced is an error, and
nobody else notices."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from typing import Any
from unittest import mock

import pytest
from jsonschema import Draft202012Validator
from lark import Lark

from hnet_runtime.config import EOS
from hnet_runtime.engine import structure
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.constraints import compiled
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Constraint, SamplingParams
from hnet_runtime.engine.request import RequestError

PROMPT = b"\xfeAn example: "
WHITESPACE = r" ?|\n[ \t]{0,32}"
SHORT = {"type": "string", "maxLength": 8}
SCHEMAS: dict[str, Any] = {
    "bounded string": {"type": "string", "minLength": 2, "maxLength": 6},
    "plain string": {"type": "string"},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3,4}$"},
    "loose pattern": {"type": "string", "pattern": "ab+", "maxLength": 9},
    "date": {"type": "string", "format": "date"},
    "date and time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "recursion": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "any of": {
        "anyOf": [{"type": "integer"}, SHORT, {"type": "null"}, {"type": "array", "items": {"type": "boolean"}}]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
            {"properties": {"b": SHORT}, "required": ["b"], "additionalProperties": {"type": "null"}},
            {"maxProperties": 3, "required": ["a", "b"]},
        ]
    },
    "number range": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 3.25},
    "integer range": {"type": "integer", "minimum": -13, "exclusiveMaximum": 1299},
    "multiples": {"type": "number", "multipleOf": 0.25, "minimum": -2, "maximum": 70},
    "optional properties": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": SHORT, "c": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "additional properties": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,4}$": {"type": "integer"}},
        "maxProperties": 3,
        "additionalProperties": False,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, SHORT],
        "items": {"type": "boolean"},
        "minItems": 2,
        "maxItems": 4,
    },
    "enumeration": {"enum": [1, "a", None, {"x": [1]}, 1.5, "é\n"]},
    "constant": {"const": {"a": [True, "ß"]}},
    "types": {"type": ["integer", "null", "boolean"]},
    "any object": {"type": "object", "maxProperties": 2},
    "reference with more": {"$defs": {"x": {"type": "integer"}}, "$ref": "#/$defs/x", "minimum": 5, "maximum": 8},
}
REFUSED: dict[str, Any] = {
    "unique items": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "a"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
}
REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9})?",
    r"(yes|no|maybe)( indeed)*[.!]",
    r"#[0-9a-f]{6}",
    r"[^\n]{5,20}\n",
    r"(?:\d{1,3}\.){3}\d{1,3}",
    r"\w{1,9}@\w{1,9}\.(com|org)",
    r"é[世界]{2,4}🦊?",
    r"(a|b){0,9}abb",
    r".{3}",
]
GRAMMARS = [
    ('start: "(" start ")" | "x" "+" start | "x"', "lark"),
    ('start: WORD ("," WORD)* "."\nWORD: /[a-z]{1,5}/', "lark"),
    ('root ::= item item? "end"\nitem ::= "- " [a-z]{1,9} "\\n"', r"(- [a-z]{1,9}\n){1,2}end"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(engine_config=EngineConfig(max_num_seqs=64, max_model_len=1024))


def asked(constraint: Constraint, choice: int, **more: Any) -> SamplingParams:
    # What ends strings, objects and numbers is made a little more probable, so that more completions come to an end.
    bias = ((EOS, 4.0), *((byte, 3.0) for byte in b'"}],'))
    options = {"max_tokens": 160, "seed": 11, "choice": choice, "logit_bias": bias, **more}
    return SamplingParams(constraint=constraint, **options)


def finished(engine: Engine, constraint: Constraint, count: int = 64, **more: Any) -> list[str]:
    """The texts of those completions at temperature 1 that came to an end by themselves; the others are beginnings."""
    completions = engine.generate([PROMPT] * count, [asked(constraint, choice, **more) for choice in range(count)])
    texts = []
    for completion in completions:
        assert completion.finish_reason in ("stop", "length"), completion.error
        text = completion.data.decode()
        assert compiled(constraint).begin().permits(completion.data)
        if completion.finish_reason == "stop":
            texts.append(text)
    return texts


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_json_is_valid(engine: Engine, name: str) -> None:
    schema = SCHEMAS[name]
    texts = finished(engine, Constraint(kind="json", source=json.dumps(schema), whitespace=WHITESPACE))
    assert len(texts) >= 20
    # Numbers as JSON has them, not as floats round them.
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = Draft202012Validator(exact, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for text in texts:
        validator.validate(json.loads(text, parse_float=Decimal))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_ends_with_an_error_that_names_it(engine: Engine, name: str) -> None:
    constraint = Constraint(kind="json", source=json.dumps(REFUSED[name]))
    (completion,) = engine.generate([PROMPT], asked(constraint, 0))
    assert (completion.finish_reason, completion.data) == ("error", b"")
    assert completion.error is not None
    assert next(key for key in REFUSED[name] if key not in ("type", "items")) in completion.error


@pytest.mark.parametrize("pattern", REGEXES)
def test_every_finished_text_matches(engine: Engine, pattern: str) -> None:
    texts = finished(engine, Constraint(kind="regex", source=pattern))
    assert len(texts) >= 20
    assert all(re.fullmatch(pattern, text) for text in texts)


@pytest.mark.parametrize(("source", "reader"), GRAMMARS)
def test_every_finished_text_is_of_the_grammar(engine: Engine, source: str, reader: str) -> None:
    texts = finished(engine, Constraint(kind="grammar", source=source))
    assert len(texts) >= 20
    for text in texts:
        if reader == "lark":
            Lark(source, parser="earley", lexer="dynamic").parse(text)
        else:
            assert re.fullmatch(reader, text)


def test_a_choice_is_one_of_them(engine: Engine) -> None:
    choices = ["yes", "no", "né", "yesterday"]
    texts = finished(engine, Constraint(kind="choice", source=json.dumps(choices)))
    assert len(texts) == 64
    assert set(texts) <= set(choices)


# ── exactness ───────────────────────────────────────────────────────────────────────────────────────

OBJECT = Constraint(
    kind="json",
    source=json.dumps(
        {
            "type": "object",
            "properties": {"name": SHORT, "kind": {"enum": ["one", "other"]}},
            "required": ["name", "kind"],
        }
    ),
    whitespace="",
)


@pytest.mark.parametrize("more", [{"logprobs": 1}, {"stop": (b"never comes",), "utf8": "raw"}])
def test_forced_bytes_are_what_single_steps_would_bring(engine: Engine, more: dict[str, Any]) -> None:
    """Whether they are taken ahead and run at once (not with logprobs), or a mask in a thread is late."""
    plain = [asked(OBJECT, choice, return_chunks=True) for choice in range(8)]
    expected = [(each.data, each.chunks, each.usage.chunks) for each in engine.generate([PROMPT] * 8, plain)]
    others = [asked(OBJECT, choice, return_chunks=True, **more) for choice in range(8)]
    for dear in (structure.DEAR_SECONDS, -1.0):
        with mock.patch.object(structure, "DEAR_SECONDS", dear):
            found = engine.generate([PROMPT] * 8, others)
        assert [(each.data, each.chunks, each.usage.chunks) for each in found] == expected


def test_forced_bytes_run_as_one_span(driver_of: Any) -> None:
    driver = driver_of("b_2stage")
    text = "this whole sentence has to come, whatever the model says, and then a digit: "
    constraint = Constraint(kind="regex", source=text + "[0-9]!")
    alone = driver.alone(PROMPT, max_tokens=200, constraint=constraint)
    assert re.fullmatch(text + "[0-9]!", alone.data.decode())
    assert len(driver.ticks) < 15


def test_max_tokens_cut_a_beginning(engine: Engine) -> None:
    lengths = range(1, 60)
    (whole,) = engine.generate([PROMPT], asked(OBJECT, 0))
    cut = engine.generate([PROMPT] * len(lengths), [asked(OBJECT, 0, max_tokens=most) for most in lengths])
    for most, completion in zip(lengths, cut, strict=True):
        assert whole.data.startswith(completion.data)
        assert completion.finish_reason == ("stop" if most > len(whole.data) else "length")
        assert len(completion.data) in range(most - 3, most + 1) or completion.finish_reason == "stop"


def test_a_character_that_does_not_fit_any_more_ends_it_as_length(engine: Engine) -> None:
    constraint = Constraint(kind="regex", source="a(é|世|🦊)b")
    seen = set()
    for most in range(1, 7):
        for choice in range(6):
            (completion,) = engine.generate([PROMPT], asked(constraint, choice, max_tokens=most, temperature=2.0))
            assert completion.finish_reason in ("stop", "length")
            completion.data.decode()
            seen.add((most, completion.data))
    assert (2, b"a") in seen  # no character of one byte may come


def test_where_nothing_may_follow_it_ends_though_nothing_else_may_end_it(engine: Engine) -> None:
    constraint = Constraint(kind="choice", source='["abc"]')
    for more in ({"min_tokens": 9}, {"ignore_eos": True}, {"ignore_eos": True, "utf8": "raw"}):
        (completion,) = engine.generate([PROMPT], asked(constraint, 0, **more))
        assert (completion.data, completion.finish_reason) == (b"abc", "stop")


def test_stop_strings_and_bytes_end_it_early(engine: Engine) -> None:
    constraint = Constraint(kind="regex", source="one two three")
    (completion,) = engine.generate([PROMPT], asked(constraint, 0, stop=(b"two",)))
    assert (completion.data, completion.stop_reason) == (b"one ", b"two")
    (completion,) = engine.generate([PROMPT], asked(constraint, 0, stop_token_ids=(ord("t"),)))
    assert (completion.data, completion.stop_reason) == (b"one ", ord("t"))
    (completion,) = engine.generate([PROMPT], asked(constraint, 0, stop=(b"e", b"wo t"), min_tokens=5))
    assert (completion.data, completion.stop_reason) == (b"one t", b"wo t")


def test_filters_and_constraints_together_never_leave_half_a_character(engine: Engine) -> None:
    """A character is begun only where some of it may come by all of them at once."""
    continuations = tuple(byte for byte in range(256) if byte not in (0xA8, 0xAA))
    constraint = Constraint(kind="regex", source="([èê]|[a-c]){4,9}")
    for choice in range(30):
        (completion,) = engine.generate(
            [PROMPT], asked(constraint, choice, temperature=2.0, allowed_token_ids=continuations)
        )
        assert completion.finish_reason == "stop"
        assert re.fullmatch("[a-c]{4,9}", completion.data.decode())
        (completion,) = engine.generate(
            [PROMPT], asked(constraint, choice, temperature=2.0, bad_words=("aè".encode(), "ê".encode(), b"cc"))
        )
        assert completion.finish_reason in ("stop", "error")
        assert not re.search("aè|ê|cc", completion.data.decode())


def test_a_dead_end_is_the_senders_error(engine: Engine) -> None:
    constraint = Constraint(kind="regex", source="abc")
    (completion,) = engine.generate([PROMPT], asked(constraint, 0, bad_words=(b"b",)))
    assert (completion.data, completion.finish_reason) == (b"a", "error")
    assert completion.error is not None
    assert "bad_words, min_tokens and a constraint" in completion.error


def test_a_prompt_that_ends_inside_a_character_cannot_be_gone_on_from(engine: Engine) -> None:
    constraint = Constraint(kind="regex", source="abc")
    with pytest.raises(RequestError, match="inside a character"):
        engine.generate([b"\xfe\xc3"], asked(constraint, 0))
    (completion,) = engine.generate([b"\xfe\xc3"], asked(constraint, 0, utf8="raw"))
    assert completion.data == b"abc"


def test_byte_255_is_no_text_of_a_constraint(engine: Engine) -> None:
    constraint = Constraint(kind="regex", source="a{3,20}")
    for more in ({"utf8": "raw", "ignore_eos": True}, {"utf8": "raw"}):
        (completion,) = engine.generate([PROMPT], asked(constraint, 1, logit_bias=((EOS, 100.0),), **more))
        assert re.fullmatch(b"a{3,20}", completion.data)


# ── what is hostile costs its sender alone ──────────────────────────────────────────────────────────


def test_a_mask_that_takes_long_keeps_nobody_waiting(driver_of: Any) -> None:
    """A parser that sleeps for each byte: its row is held, others run on, and all get what they get alone."""
    plain = driver_of("b_2stage").alone(PROMPT, max_tokens=40, seed=1, ignore_eos=True).substance
    constraint = Constraint(kind="grammar", source='start: /[a-e]{3}/ "!"')
    expected = driver_of("b_2stage").alone(PROMPT, max_tokens=40, seed=2, constraint=constraint).substance
    advance = structure.Structure.advance

    def slowly(self: structure.Structure) -> None:
        structure.time.sleep(0.02)
        advance(self)

    driver = driver_of("b_2stage")
    with mock.patch.object(structure.Structure, "advance", slowly):
        driver.submit("slow", PROMPT, max_tokens=40, seed=2, constraint=constraint)
        for _ in range(5):
            driver.tick()
        driver.submit("plain", PROMPT, max_tokens=40, seed=1, ignore_eos=True)
        gathered = driver.run()
    assert gathered["plain"].substance == plain
    assert gathered["slow"].substance == expected
    ended = {output.request_id: index for index, tick in enumerate(driver.ticks) for output in tick.outputs}
    held = sum(1 for tick in driver.ticks if not tick.stats.steps)
    assert held or ended["plain"] < ended["slow"]


def test_one_that_is_aborted_or_fails_while_it_is_held_is_gone(driver_of: Any) -> None:
    driver = driver_of("b_2stage")
    constraint = Constraint(kind="grammar", source='start: "x"+')
    advance = structure.Structure.advance

    def slowly(self: structure.Structure) -> None:
        structure.time.sleep(0.03)
        advance(self)

    with mock.patch.object(structure.Structure, "advance", slowly):
        driver.submit("aborted", PROMPT, max_tokens=40, constraint=constraint)
        driver.submit("wrong", PROMPT, max_tokens=40, constraint=Constraint(kind="grammar", source="start: y"))
        for _ in range(3):
            driver.tick()
        driver.engine.abort("aborted")
        gathered = driver.run()
    assert gathered["aborted"].finish_reason == "abort"
    assert gathered["wrong"].finish_reason == "error"
    assert driver.engine.info is not None
    assert driver.ticks[-1].stats.running == driver.ticks[-1].stats.waiting == 0


def test_a_grammar_that_takes_ever_more_work_ends_with_an_error_and_others_run_on(driver_of: Any) -> None:
    plain = driver_of("b_2stage").alone(PROMPT, max_tokens=60, seed=1, ignore_eos=True).substance
    driver = driver_of("b_2stage")
    hostile = Constraint(kind="grammar", source='start: a\na: a a | "x" | a a a')
    driver.submit("hostile", PROMPT, max_tokens=400, constraint=hostile, logit_bias=((EOS, -100.0),))
    driver.submit("plain", PROMPT, max_tokens=60, seed=1, ignore_eos=True)
    gathered = driver.run(20000)
    assert gathered["plain"].substance == plain
    assert gathered["hostile"].finish_reason == "error"
    assert set(gathered["hostile"].data) <= set(b"x")


def test_random_schemas_too(engine: Engine) -> None:
    """Schemas put together at random of what is enforced."""
    rng = random.Random(5)

    def schema(depth: int) -> dict[str, Any]:
        leaves: list[dict[str, Any]] = [
            SHORT,
            {"type": "integer", "minimum": rng.randrange(-50, 5), "maximum": rng.randrange(5, 500)},
            {"type": "boolean"},
            {"enum": rng.sample(["a", "bc", 1, None, "dé"], 3)},
            {"type": "string", "pattern": rng.choice(["^a+$", "^[x-z]{2}$", "b"]), "maxLength": 6},
        ]
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(leaves)
        inner = [schema(depth - 1) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.5:
            names = rng.sample(["a", "b", "name", "é", 'q"t', "long name"], len(inner))
            required = rng.sample(names, rng.randrange(len(names) + 1))
            properties = dict(zip(names, inner, strict=True))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        if rng.random() < 0.5:
            return {"type": "array", "items": inner[0], "maxItems": 3, "minItems": rng.randrange(2)}
        return {"anyOf": inner}

    for _ in range(12):
        drawn = schema(3)
        texts = finished(engine, Constraint(kind="json", source=json.dumps(drawn), whitespace=WHITESPACE), count=16)
        validator = Draft202012Validator(drawn)
        for text in texts:
            validator.validate(json.loads(text))
