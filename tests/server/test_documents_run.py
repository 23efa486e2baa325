"""The examples of README.md and docs/api.md do what the documents say, against `hnet serve` as it is.

A command of a `sh` block that calls curl has to be answered by 200, or by the status in the comment behind it. An
answer shown there, or in a `json` block that follows, has the names that the real one has. The `python` blocks of a
document are one program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from answers import events
from conftest import ROOT, ServerProcess

from server.chat import ChatRequest
from server.schemas import CompletionRequest, SegmentRequest, StreamOptions
from server.structured import StructuredOutputs

DOCUMENTS = ["README.md", "docs/api.md"]
SHOWN_URL = "http://127.0.0.1:8000"
SECONDS = 120

_BLOCK = re.compile(r"^```(sh|python|json)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"  # (?:(?P<status>[45]\d\d)|(?P<answer>\{.*\}))$")


@dataclass
class Command:
    """A call of curl; `answer` is the one that the document shows for it, if any."""

    place: str
    text: str
    status: int = 200
    answer: Any = None


def blocks(document: str) -> list[tuple[str, str, str]]:
    """Place, language and text of each fenced block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        (f"{Path(document).name}:{text.count(chr(10), 0, match.start()) + 2}", match[1], match[2])
        for match in _BLOCK.finditer(text)
    ]


def commands() -> list[Command]:
    found: list[Command] = []
    for document in DOCUMENTS:
        before = ""
        for place, language, text in blocks(document):
            if language == "sh":
                found += _curls(place, text)
            elif language == "json" and before == "sh":
                found[-1].answer = json.loads(text)
            before = language
    return found


def _curls(place: str, text: str) -> list[Command]:
    found = []
    for index, part in enumerate(re.split(r"^(?=curl )", text, flags=re.MULTILINE)):
        if part.startswith("curl "):
            command = Command(f"{place}[{index}]", part.strip())
            if comment := _COMMENT.search(command.text):
                command.status = int(comment["status"] or 200)
                command.answer = json.loads(comment["answer"] or "null")
            found.append(command)
    return found


def has_names_of(answer: Any, shown: Any) -> bool:
    """Whether an answer has the names and kinds of the one shown, of lists in their first items."""
    if isinstance(shown, dict):
        return (
            isinstance(answer, dict)
            and set(answer) == set(shown)
            and all(has_names_of(answer[name], value) for name, value in shown.items())
        )
    if isinstance(shown, list):
        return isinstance(answer, list) and bool(answer) == bool(shown) and all(map(has_names_of, answer[:1], shown))
    numbers = (int, float)
    return type(answer) is type(shown) or (isinstance(answer, numbers) and isinstance(shown, numbers))


def run(*words: str) -> str:
    """The output of a program that has to end well."""
    proxies = {"NO_PROXY": "*", "no_proxy": "*"}
    environment = {**os.environ, **proxies, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.place)
def test_a_command_is_answered_as_the_document_says(demo: ServerProcess, command: Command) -> None:
    assert SHOWN_URL in command.text
    program = "curl() { command curl --silent --show-error --max-time 30 --write-out '\\n%{http_code}' \"$@\"; }\n"
    text, _, status = run("bash", "-c", program + command.text.replace(SHOWN_URL, demo.url)).rpartition("\n")
    assert int(status) == command.status, text
    if text.startswith("data: "):
        told = events(text)
        assert told
    elif text.startswith("{"):
        told = [json.loads(text)]
    else:
        assert text.startswith("# HELP ")
        return
    if command.status == 200:
        assert not any("error" in event for event in told), text
    choices = [choice for event in told for choice in event.get("choices", ())]
    assert all(choice["finish_reason"] != "error" for choice in choices), text
    if command.answer is not None:
        assert has_names_of(told[0], command.answer), text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_program_of_a_document_runs(demo: ServerProcess, document: str) -> None:
    parts = [f"# {place}\n{text}" for place, language, text in blocks(document) if language == "python"]
    assert parts
    assert run(sys.executable, "-c", "\n".join(parts).replace(SHOWN_URL, demo.url))


def test_the_documents_have_commands_that_fail_and_answers_that_are_shown() -> None:
    found = commands()
    assert {command.status for command in found} == {200, 400}
    assert sum(command.answer is not None for command in found) >= 6
    assert not has_names_of({"a": 1}, {"a": 1, "b": 2})
    assert not has_names_of({"a": [{"b": 1}]}, {"a": [{"c": 1}]})
    assert not has_names_of({"a": "1"}, {"a": 1})


def test_every_parameter_is_used_in_an_example() -> None:
    used = {
        name
        for document in DOCUMENTS
        for _, language, text in blocks(document)
        if language != "json"
        for name in re.findall(r"\b[a-z]\w*\b", text)
    }
    models = (CompletionRequest, ChatRequest, StreamOptions, StructuredOutputs, SegmentRequest)
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert names - used - {"include_obfuscation", "structural_tag"} == set()
