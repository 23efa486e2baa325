"""Schemas on their way to who enforces them."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest

from hnet_runtime.engine import json_schemas
from hnet_runtime.engine.json_schemas import MAX_DEPTH, SchemaError, enforceable

TEXT, NUMBER = {"type": "string"}, {"type": "number"}


def kind(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": value}, **more}, "required": ["kind"]}


@pytest.mark.parametrize(
    "branches",
    [
        [TEXT, NUMBER],
        [TEXT, {"type": ["integer", "null"]}, {"type": "boolean"}],
        [{"const": "a"}, {"enum": ["b", "c"]}],
        [kind("a"), kind("b", more=TEXT), kind("c")],
    ],
)
def test_one_of_is_any_of_where_no_value_is_of_two(branches: list[Any]) -> None:
    assert enforceable({"oneOf": branches}) == {"anyOf": branches}


@pytest.mark.parametrize(
    "branches",
    [
        [TEXT, {"type": "string", "maxLength": 3}],
        [NUMBER, {"type": "integer"}],
        [TEXT, {"maxLength": 3}],
        [{"const": "a"}, {"enum": ["a", "b"]}],
        [{"const": 1}, {"const": 1.0}],
        [kind("a"), kind("a")],
        [kind("a"), {**kind("b"), "required": []}],
        [kind("a"), {**kind("b"), "type": ["object", "null"]}],
        [TEXT, True],
        "x",
    ],
)
def test_one_of_that_might_be_two_is_refused(branches: Any) -> None:
    with pytest.raises(SchemaError, match=r"^properties\.a\.oneOf"):
        enforceable({"properties": {"a": {"oneOf": branches}}})


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"divisibleBy": 2}}}, "properties.a.divisibleBy cannot be enforced: use multipleOf"),
        ({"items": [{"disallow": "string"}]}, "items cannot be enforced as a list: use prefixItems"),
        ({"anyOf": [{}, {"extends": {}}]}, "anyOf[1].extends"),
        ({"items": {"exclusiveMinimum": True}}, "items.exclusiveMinimum must be a number"),
        ({"minProperties": 2, "required": ["a"]}, "minProperties"),
        ({"minProperties": "2"}, "minProperties"),
        ({"properties": {"a": 3}}, "properties.a must be an object or a boolean"),
        ({"$defs": {"x": {"additionalItems": False}}}, "$defs.x.additionalItems"),
        (3, "the schema must be an object or a boolean"),
    ],
)
def test_what_would_be_passed_over_is_named_with_its_place(schema: Any, words: str) -> None:
    with pytest.raises(SchemaError) as caught:
        enforceable(schema)
    assert words in str(caught.value)


def test_what_says_nothing_goes_and_the_rest_stays() -> None:
    schema = {
        "type": "object",
        "properties": {"uniqueItems": {"uniqueItems": False, "type": "array"}, "minProperties": TEXT},
        "minProperties": 1,
        "required": ["minProperties"],
        "propertyNames": True,
        "unevaluatedProperties": {},
        "default": {"oneOf": [1]},
        "enum": [{"disallow": 1}],
    }
    kept = enforceable(schema)
    assert kept == {
        "type": "object",
        "properties": {"uniqueItems": {"type": "array"}, "minProperties": TEXT},
        "required": ["minProperties"],
        "default": {"oneOf": [1]},
        "enum": [{"disallow": 1}],
    }
    assert schema["minProperties"] == 1, "the caller's own is changed"


def test_closed_objects_have_no_other_properties_unless_they_say_so() -> None:
    schema = {
        "properties": {"a": {"type": "object"}, "b": {"properties": {}, "additionalProperties": TEXT}},
        "items": {"type": "array"},
    }
    kept = enforceable(schema, closed=True)
    assert kept["additionalProperties"] is False
    assert kept["properties"]["a"]["additionalProperties"] is False
    assert kept["properties"]["b"]["additionalProperties"] == TEXT
    assert kept["items"] == {"type": "array"}


def test_depth_is_bounded() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_DEPTH + 1):
        schema = {"items": schema}
    with pytest.raises(SchemaError, match="nested"):
        enforceable(schema)


def test_dates_are_those_of_the_calendar() -> None:
    pattern = re.compile(json_schemas._DATE)
    for year in (1, 4, 100, 400, 1600, 1700, 1900, 1996, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            for day in range(33):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    date(year, month, day)
                except ValueError:
                    assert not pattern.fullmatch(text), text
                else:
                    assert pattern.fullmatch(text), text
    assert not pattern.fullmatch("0000-01-01")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("23:59:59Z", True),
        ("00:00:00.123456789+14:00", True),
        ("24:00:00Z", False),
        ("23:60:00Z", False),
        ("23:59:60Z", False),
        ("12:00:00", False),
        ("12:00:00.Z", False),
    ],
)
def test_times(text: str, is_one: bool) -> None:
    assert bool(re.fullmatch(json_schemas._TIME, text)) == is_one
