"""JSON schemas on their way to who enforces them: what would be passed over is refused, what is harmless rewritten.

llguidance refuses most of what it cannot enforce by itself. What is left is here: keywords that it takes for notes, and
those that say nothing, or the same as others that it knows. Knows schemas as plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 64

_OBSOLETE = {
    "divisibleBy": "multipleOf",
    "extends": "allOf",
    "disallow": "not",
    "additionalItems": "prefixItems and items",
}
# By keyword, whether a value of it says nothing.
_EMPTY: dict[str, Callable[[Any], bool]] = {
    "uniqueItems": lambda value: value is False,
    "unevaluatedProperties": lambda value: value is True or value == {},
    "unevaluatedItems": lambda value: value is True or value == {},
    "propertyNames": lambda value: value is True or value == {},
    "minProperties": lambda value: value == 0 and value is not False,
}
# A date is of the calendar, leap years and all, which llguidance leaves out; the year 0 is in no calendar.
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_CLOCK}:[0-5][0-9](?:[.][0-9]{{1,9}})?(?:Z|[+-]{_CLOCK})"
_CALENDAR = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLES = ("items", "additionalProperties")


class SchemaError(ValueError):
    """A schema that cannot be enforced. `str` begins with the keyword and where it is."""


def enforceable(schema: Any, *, closed: bool = False) -> Any:
    """The same schema in words that are enforced. Raises SchemaError.

    closed: objects have no properties but those that they name, unless they say so.
    """
    return _rewritten(schema, "", closed, 0)


def _rewritten(schema: Any, where: str, closed: bool, depth: int) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{where or 'the schema'} must be an object or a boolean")
    if depth > MAX_DEPTH:
        raise SchemaError(f"{where} is nested more than {MAX_DEPTH} deep")
    kept = {key: value for key, value in schema.items() if not (key in _EMPTY and _EMPTY[key](value))}
    for key, instead in _OBSOLETE.items():
        if key in kept:
            raise SchemaError(f"{_at(where, key)} cannot be enforced: use {instead}")
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(kept.get(key), bool):
            raise SchemaError(f"{_at(where, key)} must be a number")
    _check_min_properties(kept, where)
    for key in _MAPS:
        if isinstance(kept.get(key), Mapping):
            kept[key] = {
                name: _rewritten(item, _at(where, f"{key}.{name}"), closed, depth + 1)
                for name, item in kept[key].items()
            }
    for key in _LISTS:
        if isinstance(kept.get(key), list):
            kept[key] = [
                _rewritten(item, _at(where, f"{key}[{index}]"), closed, depth + 1)
                for index, item in enumerate(kept[key])
            ]
    for key in _SINGLES:
        if isinstance(kept.get(key), (Mapping, bool)):
            kept[key] = _rewritten(kept[key], _at(where, key), closed, depth + 1)
    if isinstance(kept.get("items"), list):
        raise SchemaError(f"{_at(where, 'items')} cannot be enforced as a list: use prefixItems")
    if "oneOf" in kept:
        _open_one_of(kept, where)
    if isinstance(kept.get("format"), str) and kept["format"] in _CALENDAR:
        kept["allOf"] = [
            *kept.get("allOf", []),
            {"type": "string", "pattern": f"^(?:{_CALENDAR[kept.pop('format')]})$"},
        ]
    if closed and ("properties" in kept or _types(kept) == {"object"}):
        kept.setdefault("additionalProperties", False)
    return kept


def _check_min_properties(schema: dict[str, Any], where: str) -> None:
    """`minProperties` counts names, and one may come twice: only what `required` says anyway is sure."""
    least, required = schema.get("minProperties"), schema.get("required", [])
    if least is None:
        return
    if not isinstance(least, int) or not isinstance(required, list) or least > len(set(map(str, required))):
        raise SchemaError(f"{_at(where, 'minProperties')} cannot be enforced beyond the number of required properties")
    del schema["minProperties"]


def _open_one_of(schema: dict[str, Any], where: str) -> None:
    """`oneOf` becomes `anyOf` where no value can be of two of its branches."""
    branches = schema["oneOf"]
    if not isinstance(branches, list) or "anyOf" in schema or not all(_are_apart(*pair) for pair in _pairs(branches)):
        raise SchemaError(
            f"{_at(where, 'oneOf')} cannot be enforced unless its branches differ in type, or in the constant value of "
            "a required property: use anyOf"
        )
    schema["anyOf"] = schema.pop("oneOf")


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return ((items[i], items[j]) for i in range(len(items)) for j in range(i))


def _are_apart(one: Any, other: Any) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    if (first := _types(one)) and (second := _types(other)) and not first & second:
        return True
    if (values := _values(one)) is not None and (others := _values(other)) is not None:
        return not values & others
    if not _types(one) == _types(other) == {"object"}:
        return False
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    return any(
        isinstance(these := one.get("properties", {}).get(name), Mapping)
        and isinstance(those := other.get("properties", {}).get(name), Mapping)
        and (values := _values(these)) is not None
        and (others := _values(those)) is not None
        and not values & others
        for name in shared
        if isinstance(name, str)
    )


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a value may have; empty where any. A number may be an integer."""
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
    return types | {"integer"} if "number" in types else types


def _values(schema: Mapping[str, Any]) -> set[str] | None:
    """The texts that a value may be; None where it may be something else."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return None
    return set(values)


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
