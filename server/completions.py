"""`POST /v1/completions`: from a checked request to rows of the engine, and back to one answer.

Knows what OpenAI's completion object looks like; what a choice in it looks like is
`server.choice`'s business, and how bytes travel is `server.sse`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from hnet_runtime.config import BOS
from hnet_runtime.engine import messages
from server import errors
from server.choice import Choice, ChoiceOptions
from server.engine_client import OutputStream
from server.request_id import acceptable
from server.schemas import MAX_N, CompletionRequest, Prompt, ignored_header, parse
from server.service import Service
from server.sse import KEEP_ALIVE, KEEP_ALIVE_SECONDS, EventStream, Write, disconnected, end, event

DEFAULT_MAX_TOKENS = 16
MANY_NUMBERS = 2**16  # log-probabilities; a longer answer is put together beside the event loop
MAX_LOGPROBS = 2**21  # alternatives × bytes of one response: a context of 8192 bytes with all 256
CLIENT_CLOSED_REQUEST = 499  # for the log alone; nobody is there to read it

log = logging.getLogger("hnet.server")
router = APIRouter()
_serial = itertools.count()
_T = TypeVar("_T")


@router.post(
    "/v1/completions",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}},
        }
    },
)
async def create_completion(request: Request) -> Response:
    """Completes prompts, whole or as a stream of server-sent events."""
    service: Service = request.app.state.service
    body = await request.body()
    service.admission.check()
    completion, unknown = parse(body, CompletionRequest)
    service.check_model(completion.model)
    job = CompletionJob(service, completion, request.state.request_id)
    service.admission.check(len(job.requests))
    headers = ignored_header(unknown)
    if completion.stream:
        stream = service.client.submit(*job.requests)
        return EventStream(lambda write: job.write_events(stream, write), stream.close, job.request_id, headers)
    with service.client.submit(*job.requests) as stream:
        answer = await unless_disconnected(request, job.whole(stream))
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(answer, headers=headers, media_type="application/json")


class CompletionJob:
    """One request for completions: the engine's requests it becomes and the choices they fill."""

    def __init__(self, service: Service, completion: CompletionRequest, request_id: str) -> None:
        self._service = service
        self._request = completion
        self.request_id = request_id
        self.id = f"cmpl-{acceptable(completion.request_id) or request_id}"
        self._created = int(time.time())
        self._numbers = 0  # log-probabilities in the answer, at most
        self._prompts = [prompt_bytes(prompt, completion.add_special_tokens) for prompt in completion.prompt]
        params = self._sampling_params()
        options = ChoiceOptions(
            echo=completion.echo,
            logprobs=completion.logprobs,
            strict=completion.utf8 == "strict",
            return_token_ids=completion.return_token_ids,
            return_chunks=completion.return_chunks,
            token_id_keys=completion.return_tokens_as_token_ids,
            stream_interval=completion.stream_interval,
        )
        serial = next(_serial)  # a client may use its request id twice
        self.requests: list[messages.Request] = []
        self._choices: dict[str, Choice] = {}
        for prompt, (number, max_tokens) in zip(self._prompts, enumerate(self._max_tokens()), strict=True):
            for choice in range(completion.n):
                index = number * completion.n + choice
                request = messages.Request(
                    request_id=f"{self.id}-{serial}-{index}",
                    prompt=prompt,
                    params=msgspec.structs.replace(params, choice=choice, max_tokens=max_tokens),
                    cache_salt=completion.cache_salt or "",
                )
                self.requests.append(request)
                self._choices[request.request_id] = Choice(index, prompt, options)
        self._firsts = list(self._choices.values())[:: completion.n]  # of each prompt, its first choice

    def _max_tokens(self) -> list[int]:
        """Bytes each prompt may be completed by; raises ApiError where request and model do not fit."""
        completion, limit = self._request, self._service.info.max_model_len
        if len(self._prompts) * completion.n > MAX_N:
            raise errors.invalid(
                f"prompt: {len(self._prompts)} prompts × n {completion.n} is more than {MAX_N} choices", "prompt"
            )
        allowed = []
        for prompt in self._prompts:
            asked = completion.max_tokens
            if len(prompt) > limit or (len(prompt) == limit and asked != 0):
                raise errors.invalid(
                    f"prompt: {len(prompt)} bytes (BOS included) leave no room to complete; "
                    f"the model's context is {limit} bytes",
                    "prompt",
                    "context_length_exceeded",
                )
            if asked is not None and len(prompt) + asked > limit:
                raise errors.invalid(
                    f"max_tokens: {asked} after a prompt of {len(prompt)} bytes (BOS included) is more than "
                    f"the model's context of {limit} bytes",
                    "max_tokens",
                    "context_length_exceeded",
                )
            allowed.append(min(DEFAULT_MAX_TOKENS, limit - len(prompt)) if asked is None else asked)
        if completion.logprobs is not None:
            echoed = sum(map(len, self._prompts)) if completion.echo else 0
            entries = max(1, completion.logprobs) * completion.n * (sum(allowed) + echoed)
            self._numbers = entries
            if entries > MAX_LOGPROBS:
                raise errors.invalid(
                    f"logprobs: {completion.logprobs} for every byte asked for is {entries} numbers; "
                    f"at most {MAX_LOGPROBS} are allowed",
                    "logprobs",
                )
        return allowed

    def _sampling_params(self) -> messages.SamplingParams:
        completion = self._request
        # top_p 0 keeps the most probable byte alone, which is what top_k 1 says.
        top_k, top_p = (completion.top_k, completion.top_p) if completion.top_p else (1, 1.0)
        return messages.SamplingParams(
            temperature=completion.temperature,
            top_k=top_k if 0 < top_k < 256 else 0,
            top_p=top_p,
            min_p=completion.min_p,
            seed=secrets.randbits(63) if completion.seed is None else completion.seed,
            stop=tuple(completion.stop or ()),
            ignore_eos=completion.ignore_eos,
            utf8=completion.utf8,
            logprobs=completion.logprobs,
            prompt_logprobs=completion.logprobs if completion.echo else None,
            return_chunks=completion.return_chunks,
        )

    async def whole(self, stream: OutputStream) -> bytes:
        """The response of a request that does not stream, as JSON."""
        await stream.until_ended()
        self._add(await stream.take())
        if self._numbers > MANY_NUMBERS:
            return await asyncio.to_thread(self._encode)
        return self._encode()

    def _encode(self) -> bytes:
        choices = [choice.take() for choice in self._choices.values()]
        return msgspec.json.encode({**self._head(), "choices": choices, "usage": self._usage()})

    async def write_events(self, stream: OutputStream, write: Write) -> None:
        """Writes the events of a request that streams, but `[DONE]`."""
        pace, clock = self._service.pace, time.perf_counter
        options = self._request.stream_options
        pace.live += 1
        written = clock()
        try:
            while True:
                outputs = await stream.take(KEEP_ALIVE_SECONDS)
                if not outputs and stream.ended:
                    break
                began = clock()
                data = b"".join(self._event(choice) for choice in self._add(outputs))
                if data:
                    await write(data)
                    pace.measure(clock() - began)
                    written = clock()
                elif began - written >= KEEP_ALIVE_SECONDS:
                    await write(KEEP_ALIVE)
                    written = began
                if pace.gather_seconds > 0 and not stream.ended:
                    await asyncio.sleep(pace.gather_seconds)
        finally:
            pace.live -= 1
        if options is not None and options.include_usage:
            await write(event(msgspec.json.encode({**self._head(), "choices": [], "usage": self._usage()})))

    def _add(self, outputs: Sequence[messages.Output]) -> list[Choice]:
        touched = []
        for output in outputs:
            choice = self._choices[output.request_id]
            choice.add(output)
            touched.append(choice)
            if choice.error is not None:
                log.error("request %s choice %d ended with an error: %s", self.request_id, choice.index, choice.error)
        return touched

    def _event(self, choice: Choice) -> bytes:
        shown = choice.take()
        if shown is None:
            return b""
        document = {**self._head(), "choices": [shown]}
        options = self._request.stream_options
        if options is not None and options.continuous_usage_stats:
            document["usage"] = usage([self._firsts[choice.index // self._request.n]], [choice])
        elif options is not None and options.include_usage:
            document["usage"] = None
        return event(msgspec.json.encode(document))

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "system_fingerprint": None,
        }

    def _usage(self) -> dict[str, Any]:
        return usage(self._firsts, list(self._choices.values()))


def prompt_bytes(prompt: Prompt, add_special_tokens: bool) -> bytes:
    """What the model reads: byte ids as they are, a text's UTF-8 after BOS unless that is not wanted."""
    if isinstance(prompt, bytes):
        return prompt
    data = bytes((BOS,)) + prompt.encode() if add_special_tokens else prompt.encode()
    if not data:
        raise errors.invalid("prompt: an empty text without BOS (add_special_tokens false) is no prompt", "prompt")
    return data


def usage(firsts: Sequence[Choice], choices: Sequence[Choice]) -> dict[str, Any]:
    """OpenAI's usage object in bytes; chunks per stage, of prompt and completion, where all is known.

    Each prompt counts once, by its first choice, one of `firsts`: what other choices share with that is no cache hit.
    """
    read, wrote = sum(first.prompt_length for first in firsts), sum(choice.num_bytes for choice in choices)
    chunks = [choice.usage.chunks for choice in choices if choice.usage is not None]
    details = {"chunks": [sum(stage) for stage in zip(*chunks, strict=True)]} if len(chunks) == len(choices) else {}
    return {
        "prompt_tokens": read,
        "completion_tokens": wrote,
        "total_tokens": read + wrote,
        "prompt_tokens_details": {"cached_tokens": sum(first.cached_bytes for first in firsts)},
        "completion_tokens_details": details,
    }


async def unless_disconnected(request: Request, work: Awaitable[_T]) -> _T | None:
    """What `work` gives, or None when the client has gone away before it was done."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        await end(watcher)
        await asyncio.gather(task, return_exceptions=True)
