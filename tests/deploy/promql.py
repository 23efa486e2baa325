"""What a PromQL expression asks for, by Prometheus's own grammar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser


def metrics(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric that an expression names, with the labels it is selected and grouped by.

    Raises ValueError for what is no PromQL.
    """
    tree = promql_parser.parse(expression)
    groups = [node for node in _nodes(tree) if isinstance(node, promql_parser.AggregateExpr) and node.modifier]
    for selector in _selectors(tree):
        labels = {matcher.name for matcher in selector.matchers.matchers}
        for group in groups:
            if any(each is selector for each in _selectors(group)):
                labels |= set(group.modifier.labels)
        yield selector.name, labels


def _selectors(node: Any) -> list[Any]:
    return [each for each in _nodes(node) if isinstance(each, promql_parser.VectorSelector)]


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    children = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    for child in (*children, *getattr(node, "args", ())):
        if child is not None:
            yield from _nodes(child)
