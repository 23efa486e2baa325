"""A text that is read and not gone on with: what `/v1/segment` and `/v1/score` have in common."""

from __future__ import annotations

import itertools

from fastapi import Request

from hnet_runtime.engine import messages
from server import errors
from server.completions import prompt_bytes, unless_disconnected
from server.output_stream import OutputStream
from server.schemas import Prompt
from server.service import Service

_serial = itertools.count()


async def read_input(
    request: Request, service: Service, given: Prompt, params: messages.SamplingParams, *, verb: str, prefix: str
) -> messages.Output | None:
    """All that the engine says of an input, or None where the client went away. `verb` is what is done with it, and
    `prefix` begins the id under which the engine knows it.

    Raises ApiError for one that does not fit the context, and for one that the engine failed at.
    """
    data = prompt_bytes(given, add_special_tokens=True)
    limit = service.info.max_model_len
    if len(data) > limit:
        raise errors.invalid(
            f"input: {len(data)} bytes (BOS included) are more than the model's context of {limit} bytes",
            "input",
            "context_length_exceeded",
        )
    request_id = f"{prefix}-{request.state.request_id}-{next(_serial)}"  # a client may use its id twice
    job = messages.Request(request_id=request_id, prompt=data, params=params)
    with service.client.submit(job) as stream:
        output = await unless_disconnected(request, _whole(stream))
    if output is not None and output.finish_reason == "error":
        raise errors.ApiError(500, f"The engine could not {verb} the input: {output.error}", type="server_error")
    return output


async def _whole(stream: OutputStream) -> messages.Output:
    await stream.until_ended()
    (output,) = await stream.take()
    return output
