"""How well a model predicts a text, as JSON: what `POST /v1/score` and `hnet score --json` give.

Knows the log-probabilities of an engine; not who asked, nor how the text got in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hnet_runtime.engine.messages import ByteLogprobs
from server.choice import LOWEST_LOGPROB


def byte_logprobs(entries: Iterable[ByteLogprobs]) -> list[float]:
    """Natural-log probabilities, one each; minus infinity as −9999."""
    return [max(entry.logprob, LOWEST_LOGPROB) for entry in entries]


def bits_per_byte(logprobs: Sequence[float]) -> float | None:
    """The mean of −log₂ p over bytes that were predicted; None where there are none."""
    return -math.fsum(logprobs) / (len(logprobs) * math.log(2)) if logprobs else None


def score(model: str, logprobs: Sequence[float], num_read: int) -> dict[str, Any]:
    """A text's score by the log-probabilities of all its bytes but the first, which nothing predicts (BOS as a rule).

    `num_read` is how many bytes the model has read for it.
    """
    return {
        "object": "score",
        "model": model,
        "input_bytes": len(logprobs) + 1,
        "logprobs": [None, *logprobs],
        "bits_per_byte": bits_per_byte(logprobs),
        "usage": {"prompt_tokens": num_read, "completion_tokens": 0, "total_tokens": num_read},
    }
