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


def among(*values: Any) -> Callable[[Any], bool]:
    """Equal to one of them in value and type; with none, never."""
    return lambda value: any(type(value) is type(item) and value == item for item in values)


TEXT_ALONE = "is not supported: the model reads and writes text alone"
NO_REASONING = "is not supported: the model does not reason apart"
_ONE_SERVER = "is not supported: a request is served in one place"


UNSUPPORTED: dict[str, Unsupported] = {
    # OpenAI's
    "suffix": Unsupported(_empty, "is not supported: an H-Net completes and does not insert"),
    # vLLM's
    "truncation_side": Unsupported(_is("left"), "is not supported: what is kept of a prompt is its end"),
    "skip_special_tokens": Unsupported(_is(True), "is not supported: neither BOS nor EOS is part of a text"),
    "spaces_between_special_tokens": Unsupported(among(True, False)),
    "logprob_token_ids": Unsupported(_empty, "is not supported: logprobs 256 gives all bytes"),
    "return_token_offsets": Unsupported(_is(False), "is not supported: logprobs have text_offset"),
    "repetition_detection": Unsupported(_empty),
    "watermarking": Unsupported(_is(False)),
    "thinking_token_budget": Unsupported(_is(-1), NO_REASONING),
    "routed_experts_prompt_start": Unsupported(_is(0), "is not supported: the model has no experts"),
    "mm_payload": Unsupported(among("tensors", "none"), TEXT_ALONE),
    "return_mm_kwargs": Unsupported(among(True, False), TEXT_ALONE),
    "kv_transfer_params": Unsupported(_empty, _ONE_SERVER),
    "ec_transfer_params": Unsupported(_empty, _ONE_SERVER),
    "vllm_xargs": Unsupported(_empty, "is not supported: there are no extensions"),
    "length_penalty": Unsupported(_is(1), "is not supported; only 1 is accepted"),
    "guided_json": Unsupported(among(), "is not supported: it is structured_outputs.json now"),
    "guided_regex": Unsupported(among(), "is not supported: it is structured_outputs.regex now"),
    "guided_choice": Unsupported(among(), "is not supported: it is structured_outputs.choice now"),
    "guided_grammar": Unsupported(among(), "is not supported: it is structured_outputs.grammar now"),
    "guided_whitespace_pattern": Unsupported(
        among(), "is not supported: it is structured_outputs.whitespace_pattern now"
    ),
    "use_beam_search": Unsupported(_is(False), "is not supported; only false is accepted"),
    "prompt_embeds": Unsupported(among()),
    "logits_processors": Unsupported(_empty),
}
