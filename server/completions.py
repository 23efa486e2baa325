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
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from hnet_runtime.config import BOS, VOCAB_SIZE
from hnet_runtime.engine import messages
from hnet_runtime.engine.utf8 import can_begin
from server import errors
from server.choice import Choice, ChoiceOptions
from server.output_stream import OutputStream
from server.request_id import acceptable
from server.responses import CompletionAnswer, described
from server.schemas import MAX_N, CompletionRequest, GenerationRequest, Prompt, ignored_header, parse, request_body
from server.service import Service
from server.sse import EventStream, EventTemplate, Write, disconnected, end

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
    responses=described(CompletionAnswer, streams=True),
    openapi_extra=request_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Completes prompts, whole or as a stream of server-sent events."""
    service: Service = request.app.state.service
    body = await request.body()
    service.admission.check()
    completion, unknown = parse(body, CompletionRequest)
    service.check_model(completion.model)
    constraint = await service.constraint(completion)
    job = CompletionJob(service, completion, request.state.request_id, constraint)
    return await job.answer(request, ignored_header(unknown))


class CompletionJob:
    """One request for completions: the engine's requests it becomes and the choices they fill."""

    KIND = "cmpl"  # begins its id

    def __init__(
        self,
        service: Service,
        completion: CompletionRequest,
        request_id: str,
        constraint: messages.Constraint | None = None,
    ) -> None:
        self._service = service
        self._request = completion
        self.request_id = request_id
        self.id = f"{self.KIND}-{acceptable(completion.request_id) or request_id}"
        self._created = int(time.time())
        self._is_constrained = constraint is not None
        self._numbers = 0  # log-probabilities in the answer, at most
        self._prompts = [self._prompt(prompt) for prompt in completion.prompt]
        self._candidates = completion.best_of or completion.n  # of each prompt
        ranks = self._candidates > completion.n
        params = sampling_params(
            completion,
            logprobs=0 if ranks and completion.logprobs is None else completion.logprobs,
            prompt_logprobs=self._prompt_logprobs(),
            constraint=constraint,
        )
        options = ChoiceOptions(
            echo=completion.echo,
            logprobs=completion.logprobs,
            strict=completion.utf8 == "strict",
            return_token_ids=completion.return_token_ids,
            return_chunks=completion.return_chunks,
            token_id_keys=completion.return_tokens_as_token_ids,
            stream_interval=completion.stream_interval,
            prompt_logprobs=_all_bytes(completion.prompt_logprobs),
        )
        serial = next(_serial)  # a client may use its request id twice
        self.requests: list[messages.Request] = []
        self._choices: dict[str, Choice] = {}
        for prompt, (number, max_tokens) in zip(self._prompts, enumerate(self._max_tokens()), strict=True):
            for choice in range(self._candidates):
                index = number * self._candidates + choice
                request = messages.Request(
                    request_id=f"{self.id}-{serial}-{index}",
                    prompt=prompt,
                    params=msgspec.structs.replace(params, choice=choice, max_tokens=max_tokens),
                    cache_salt=completion.cache_salt or "",
                    priority=completion.priority,
                )
                self.requests.append(request)
                self._choices[request.request_id] = Choice(index, prompt, options)
        self._firsts = list(self._choices.values())[:: self._candidates]  # of each prompt, its first choice

    def _prompt(self, prompt: Prompt) -> bytes:
        """What the model reads of a prompt, once it is cut to the length asked for."""
        completion = self._request
        most = completion.truncate_prompt_tokens
        if most == -1:
            asked = DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens
            most = max(self._service.info.max_model_len - asked, 1)
        return truncated(prompt_bytes(prompt, completion.add_special_tokens), most, is_text=isinstance(prompt, str))

    def _prompt_logprobs(self) -> int | None:
        """Alternatives for each byte of a prompt, as many as any way of showing them needs."""
        completion = self._request
        echoed = completion.logprobs if completion.echo else None
        wanted = [count for count in (echoed, _all_bytes(completion.prompt_logprobs)) if count is not None]
        return max(wanted, default=None)

    def _max_tokens(self) -> list[int]:
        """Bytes each prompt may be completed by; raises ApiError where request and model do not fit."""
        completion, limit = self._request, self._service.info.max_model_len
        if len(self._prompts) * self._candidates > MAX_N:
            name = "n" if self._candidates == completion.n else "best_of"
            raise errors.invalid(
                f"prompt: {len(self._prompts)} prompts × {name} {self._candidates} is more than {MAX_N} choices",
                "prompt",
            )
        allowed = []
        for prompt in self._prompts:
            if self._is_constrained and not can_begin(prompt, completion.utf8):
                raise errors.invalid(
                    "prompt: ends inside a character, behind which nothing structured can come", "prompt"
                )
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
            if completion.min_tokens > allowed[-1]:
                raise errors.invalid(
                    f"min_tokens: {completion.min_tokens} is more than the {allowed[-1]} bytes that may come",
                    "min_tokens",
                )
        read = sum(map(len, self._prompts))
        if completion.logprobs is not None:
            self._count("logprobs", completion.logprobs, sum(allowed) + (read if completion.echo else 0))
        if completion.prompt_logprobs is not None:
            self._count("prompt_logprobs", _all_bytes(completion.prompt_logprobs) or 0, read)
        return allowed

    def _count(self, name: str, alternatives: int, num_bytes: int) -> None:
        """Adds to the numbers of the answer; raises ApiError where they are too many."""
        self._numbers += max(1, alternatives) * self._candidates * num_bytes
        if self._numbers > MAX_LOGPROBS:
            raise errors.invalid(
                f"{name}: {alternatives} for every byte asked for makes {self._numbers} numbers; "
                f"at most {MAX_LOGPROBS} are allowed",
                name,
            )

    async def answer(self, request: Request, headers: dict[str, str]) -> Response:
        """Runs it, once the gate lets it in; what it gives, as the request asks for it."""
        service = self._service
        service.admission.check(len(self.requests))
        if self._request.stream:
            stream = service.client.submit(*self.requests)
            return EventStream(lambda write: self.write_events(stream, write), stream.close, self.request_id, headers)
        with service.client.submit(*self.requests) as stream:
            answer = await unless_disconnected(request, self.whole(stream))
        if answer is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(answer, headers=headers, media_type="application/json")

    async def whole(self, stream: OutputStream) -> bytes:
        """The response of a request that does not stream, as JSON."""
        await stream.until_ended()
        self._add(await stream.take())
        if self._numbers > MANY_NUMBERS:
            return await asyncio.to_thread(self._encode)
        return self._encode()

    def _encode(self) -> bytes:
        choices = [choice.take() for choice in self._best()]
        return msgspec.json.encode({**self._head(), "choices": choices, "usage": self._usage()})

    def _best(self) -> list[Choice]:
        """The choices to show: where more were drawn, those of each prompt that the model finds most probable, first
        the best, and of equals the one drawn first."""
        choices = list(self._choices.values())
        if self._candidates == self._request.n:
            return choices
        best: list[Choice] = []
        for first in range(0, len(choices), self._candidates):
            drawn = choices[first : first + self._candidates]
            drawn.sort(key=lambda choice: choice.mean_logprob, reverse=True)
            for choice in drawn[: self._request.n]:
                choice.index = len(best)
                best.append(choice)
        return best

    async def write_events(self, stream: OutputStream, write: Write) -> None:
        """Writes the events of a request that streams, but `[DONE]`."""
        options = self._request.stream_options
        async for outputs in stream:
            if data := b"".join([self._event(choice) for choice in self._add(outputs)]):
                await write(data)
        if options is not None and options.include_usage:
            await write(self._template.event({"choices": [], "usage": self._usage()}))

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
        fields: dict[str, Any] = {"choices": [shown]}
        options = self._request.stream_options
        if options is not None and options.continuous_usage_stats:
            fields["usage"] = usage([self._firsts[choice.index // self._candidates]], [choice])
        elif options is not None and options.include_usage:
            fields["usage"] = None
        return self._template.event(fields)

    @cached_property
    def _template(self) -> EventTemplate:
        return EventTemplate(self._head())

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


def truncated(prompt: bytes, most: int | None, *, is_text: bool) -> bytes:
    """The last `most` bytes of a prompt, a BOS it begins with among them; None keeps all.

    A text is cut before a whole character, and so may be shorter by up to three bytes.
    """
    if most is None or len(prompt) <= most:
        return prompt
    head = prompt[:1] if prompt[0] == BOS else b""
    begin = len(prompt) - most + len(head)
    while is_text and begin < len(prompt) and prompt[begin] & 0xC0 == 0x80:
        begin += 1
    return (head + prompt[begin:]) or prompt[-most:]


def _all_bytes(alternatives: int | None) -> int | None:
    return VOCAB_SIZE if alternatives == -1 else alternatives


def sampling_params(
    request: GenerationRequest,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    constraint: messages.Constraint | None = None,
) -> messages.SamplingParams:
    """How the rows of a request are decoded; `max_tokens` and `choice` are each row's own. A seed is drawn where none
    is asked for."""
    # top_p 0 keeps the most probable byte alone, which is what top_k 1 says.
    top_k, top_p = (request.top_k, request.top_p) if request.top_p else (1, 1.0)
    return messages.SamplingParams(
        temperature=request.temperature,
        top_k=top_k if 0 < top_k < 256 else 0,
        top_p=top_p,
        min_p=request.min_p,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=tuple((request.logit_bias or {}).items()),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        bad_words=tuple(request.bad_words or ()),
        min_tokens=request.min_tokens,
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        utf8=request.utf8,
        constraint=constraint,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_chunks=request.return_chunks,
    )


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
