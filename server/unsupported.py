"""Parameters that other servers know and this one cannot honour: never ignored, always named.

For each: which values mean "not used" (null always does) and what a client that uses it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """`harmless(value)` says whether a value asks for nothing; `why` completes the sentence of the error."""

    harmless: Callable[[Any], bool]
    why: str = "is not supported"


def _is(neutral: float | bool | str) -> Callable[[Any], bool]:
    """Equal in value and kind: true is no number."""
    return lambda value: isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _empty(value: Any) -> bool:
    return isinstance(value, (list, dict, str)) and not value


def _never(value: Any) -> bool:
    return False


UNSUPPORTED: dict[str, Unsupported] = {
    # OpenAI's
    "suffix": Unsupported(_empty, "is not supported: an H-Net completes and does not insert"),
    # vLLM's
    "length_penalty": Unsupported(_is(1), "is not supported; only 1 is accepted"),
    "guided_json": Unsupported(_never, "is not supported: it is structured_outputs.json now"),
    "guided_regex": Unsupported(_never, "is not supported: it is structured_outputs.regex now"),
    "guided_choice": Unsupported(_never, "is not supported: it is structured_outputs.choice now"),
    "guided_grammar": Unsupported(_never, "is not supported: it is structured_outputs.grammar now"),
    "use_beam_search": Unsupported(_is(False), "is not supported; only false is accepted"),
    "prompt_embeds": Unsupported(_never),
    "logits_processors": Unsupported(_empty),
}
