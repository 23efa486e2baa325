"""Reading what servers answer, and waiting for what they do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fake_engine import completion


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Waits until something holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def events(text: str) -> list[Any]:
    """The data of a stream's events; the last one must be `[DONE]`, which is left out."""
    data = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def expected(prompt: bytes, max_tokens: int = 16, choice: int = 0, seed: int = 0) -> bytes:
    """What the fake engine completes a prompt with at temperature 0 (or a seed)."""
    source = completion(prompt, choice, seed, temperature=1.0 if seed or choice else 0.0)
    return bytes(byte for byte, _ in zip(source, range(max_tokens), strict=False))


def samples(text: str) -> dict[str, float]:
    """Prometheus's text format → every sample by its name and labels."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
