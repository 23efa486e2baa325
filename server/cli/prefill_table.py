"""What reads prompts on a CUDA device, in lines of `hnet doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hnet_runtime.ops.triton.libraries import Choice


def prefill_lines(choices: Iterable[Choice]) -> list[tuple[str, str]]:
    """(label, text) of each operation: what runs it, and why the others do not."""
    return [("" if index else "on CUDA", _line(choice)) for index, choice in enumerate(choices)]


def _line(choice: Choice) -> str:
    form = f"{choice.name} for {choice.where}, else {choice.otherwise}" if choice.where else choice.name
    refusals = "".join(f"; not {name}: {reason}" for name, reason in choice.declined.items())
    return f"{choice.op} of prompts: {form}{refusals}"
