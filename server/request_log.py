"""One line for every request of the engine that has ended: what it was, what it took, how it ended.

A request here is one choice of one prompt. Knows counts and times; is never given a prompt, a completion
or a salt, so that no log can hold one. The form of the line is part of `docs/api.md`.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar

from hnet_runtime.engine.messages import FinishReason, Usage

_QUOTED = frozenset(' "=\\')

log = logging.getLogger("hnet.request")

# Of the HTTP request that is being answered, in hexadecimal; None where requests are not traced.
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)


def log_finished(
    request_id: str,
    reason: FinishReason,
    usage: Usage | None,
    *,
    prompt_bytes: int,
    completion_bytes: int,
    seconds: float,
    trace: str | None = None,
) -> None:
    """Logs the end of a request that `seconds` ago was sent to the engine.

    The counts are the server's own; they are shown where the engine left no usage: it refused the request, or failed.
    `trace` is the id of the trace that it is part of.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    line = f"request_id={_quoted(request_id)} reason={reason}"
    if usage is None:
        line += f" prompt_bytes={prompt_bytes} completion_bytes={completion_bytes} seconds={_figures(seconds)}"
    else:
        decoding = usage.decode_seconds
        rate = usage.completion_bytes / decoding if decoding > 0 else 0.0
        line += (
            f" prompt_bytes={usage.prompt_bytes} completion_bytes={usage.completion_bytes}"
            f" seconds={_figures(seconds)} chunks={','.join(map(str, usage.chunks))}"
            f" cached_bytes={usage.cached_bytes} queue_seconds={_figures(usage.queue_seconds)}"
            f" prefill_seconds={_figures(usage.prefill_seconds)} decode_seconds={_figures(decoding)}"
            f" park_seconds={_figures(usage.park_seconds)} decode_bytes_per_second={_figures(rate)}"
            f" preemptions={usage.preemptions}"
        )
    if trace is not None:
        line += f" trace_id={trace}"
    log.info(line)


def _figures(value: float) -> str:
    """Four significant digits, written out."""
    return f"{float(f'{value:.4g}'):.12g}"


def _quoted(name: str) -> str:
    """As it is, or in JSON's quotes: a client that names its request cannot forge a key."""
    return name if _QUOTED.isdisjoint(name) else json.dumps(name)
