"""From a conversation to the text that a model goes on with: the model's own Jinja template, or a plain transcript.

Knows messages as plain data and where templates are found; knows no HTTP. Jinja runs in a process of its own
(`server.template_worker`) that is ended when it takes too long.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hnet_runtime.checkpoint.errors import CheckpointError
from hnet_runtime.checkpoint.locate import DEMO_NAME, demo_directory, exists
from hnet_runtime.config import BOS, EOS
from server.limited_process import LimitedProcess, ProcessEnded, TookTooLong
from server.settings import ServerSettings

MAX_TEMPLATE_BYTES = 1 << 18
RENDER_SECONDS = 2.0
QUEUE_SECONDS = 10.0  # that a chat waits for others' to be rendered
MAX_NAMED = 12  # participants whose names end a transcript's completion

FILE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"
LABELS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})

log = logging.getLogger("hnet.server")

Message = Mapping[str, Any]  # role, content, and name, tool_calls, tool_call_id where there are such


class ChatTemplateError(Exception):
    """A conversation that could not be rendered; one line that says why and where."""


class ChatTemplateBusy(Exception):
    """Too many conversations wait to be rendered."""


@dataclass(frozen=True)
class Rendered:
    """What the model reads (without BOS, unless the template put one), and what ends the completion beside EOS."""

    data: bytes
    stop: tuple[bytes, ...] = ()


class ChatTemplate(Protocol):
    """`generate` asks for the beginning of an answer, `resume` for an end inside the last message."""

    takes_variables: bool

    async def render(
        self, messages: Sequence[Message], *, generate: bool, resume: bool, variables: Mapping[str, Any]
    ) -> Rendered: ...

    def close(self) -> None: ...


def find_template(settings: ServerSettings) -> ChatTemplate:
    """The template a server uses: the one set, the model directory's, or a transcript.

    One that cannot be used is logged, and refuses every conversation.
    """
    try:
        found = _find_source(settings)
    except (OSError, ValueError) as error:
        log.warning("the chat template cannot be used: %s", error)
        reason = f"{error.strerror}" if isinstance(error, OSError) else str(error)
        return UnusableTemplate(reason)
    return Transcript() if found is None else JinjaTemplate(*found)


def _find_source(settings: ServerSettings) -> tuple[str, str] | None:
    """(source, name) of a Jinja template."""
    if settings.chat_template is not None:
        path = Path(settings.chat_template)
        return _read(path), path.name
    directory = _model_directory(settings.model)
    if directory is None:
        return None
    if (directory / FILE_NAME).is_file():
        return _read(directory / FILE_NAME), FILE_NAME
    if (directory / CONFIG_NAME).is_file():
        source = _from_tokenizer_config(directory / CONFIG_NAME)
        return None if source is None else (source, CONFIG_NAME)
    return None


def _model_directory(model: str | None) -> Path | None:
    """Where a model's own template would be; None for a hub id and for random weights."""
    if model is not None and exists(model):
        path = Path(os.path.expanduser(model))
        return path if path.is_dir() else path.parent
    if model not in (None, DEMO_NAME):
        return None
    try:
        return demo_directory()
    except CheckpointError:  # which the engine says
        return None


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"{path.name}: {size} bytes are more than the {MAX_TEMPLATE_BYTES} that a template may have")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: is not UTF-8") from None


def _from_tokenizer_config(path: Path) -> str | None:
    """`chat_template`: a text, or a list of named ones, of which `default` is taken."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: not valid JSON: {error}") from None
    template = document.get("chat_template") if isinstance(document, dict) else None
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path.name}: chat_template is not a text")
    if template is not None and len(template.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
        raise ValueError(f"{path.name}: chat_template has more than {MAX_TEMPLATE_BYTES} bytes")
    return template


class UnusableTemplate:
    """Stands for a template that could not be read."""

    takes_variables = True

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def render(
        self, messages: Sequence[Message], *, generate: bool, resume: bool, variables: Mapping[str, Any]
    ) -> Rendered:
        raise ChatTemplateError(self._reason)

    def close(self) -> None:
        """Nothing is open."""


class Transcript:
    """For base models: `User: …` and `Assistant: …` between empty lines, until somebody else would speak."""

    takes_variables = False

    async def render(
        self, messages: Sequence[Message], *, generate: bool, resume: bool, variables: Mapping[str, Any]
    ) -> Rendered:
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                raise ChatTemplateError(f"messages[{index}].tool_calls: a plain transcript has no form for them")
        text = "\n\n".join(f"{_label(message)}: {message['content']}" for message in messages)
        if generate:
            text += f"\n\n{LABELS['assistant']}: "
        elif not resume:
            text += "\n\n"
        named = list(dict.fromkeys(_label(message) for message in messages if message.get("name")))
        speakers = dict.fromkeys([*LABELS.values(), *named[-MAX_NAMED:]])
        stop = tuple(f"{lines}{speaker}:".encode() for speaker in speakers for lines in ("\n\n", "\n"))
        return Rendered(text.encode(), stop)

    def close(self) -> None:
        """Nothing is open."""


def _label(message: Message) -> str:
    return str(message.get("name") or LABELS[message["role"]])


class JinjaTemplate:
    """A Jinja template, rendered one conversation at a time.

    `bos_token` and `eos_token` are the bytes 254 and 255: while the template runs, each is a text that nobody can
    guess, so that no message can contain one.
    """

    takes_variables = True

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        self._worker = LimitedProcess("server.template_worker", source)
        self._turn = asyncio.Semaphore(1)

    async def render(
        self, messages: Sequence[Message], *, generate: bool, resume: bool, variables: Mapping[str, Any]
    ) -> Rendered:
        bos, eos, end = (f"\ue000{secrets.token_hex(16)}\ue001" for _ in range(3))
        shown = [dict(message) for message in messages]
        if resume:
            shown[-1]["content"] += end
        job = {
            **variables,
            "messages": shown,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generate,
            "bos_token": bos,
            "eos_token": eos,
        }
        try:
            await asyncio.wait_for(self._turn.acquire(), QUEUE_SECONDS)
        except TimeoutError:
            raise ChatTemplateBusy from None
        try:
            text = await asyncio.to_thread(self._render, job)
            if resume:
                text, found, _ = text.rpartition(end)
                if not found:
                    raise ChatTemplateError("does not show the end of the last message, which is to be continued")
            data = text.encode()
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{self._name}: {error}") from None
        except UnicodeEncodeError:
            raise ChatTemplateError(f"{self._name}: gives a lone surrogate, which no text can contain") from None
        finally:
            self._turn.release()
        return Rendered(data.replace(bos.encode(), bytes((BOS,))).replace(eos.encode(), bytes((EOS,))))

    def _render(self, job: Mapping[str, Any]) -> str:
        try:
            answer = self._worker.ask(job, RENDER_SECONDS)
        except RecursionError:
            raise ChatTemplateError("chat_template_kwargs are nested too deeply") from None
        except TookTooLong:
            raise ChatTemplateError(f"took more than {RENDER_SECONDS:g} s") from None
        except ProcessEnded:
            raise ChatTemplateError("ended its process: it takes too much memory or time") from None
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        self._worker.close()
