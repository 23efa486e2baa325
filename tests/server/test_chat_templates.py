"""Templates: which one is found, what it gives, and that a hostile one harms nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server import chat_templates
from server.chat_templates import (
    ChatTemplate,
    ChatTemplateBusy,
    ChatTemplateError,
    JinjaTemplate,
    Rendered,
    Transcript,
    UnusableTemplate,
    find_template,
)
from server.settings import ServerSettings
from server.template_worker import MAX_RENDERED

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|{{ message.role }}|>{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


async def render(template: ChatTemplate, messages: Any = TALK, **options: Any) -> Rendered:
    chosen: dict[str, Any] = {"generate": True, "resume": False, "variables": {}, **options}
    return await template.render(messages, **chosen)


@pytest.fixture
def jinja() -> Iterator[Callable[[str], JinjaTemplate]]:
    made: list[JinjaTemplate] = []

    def make(source: str) -> JinjaTemplate:
        made.append(JinjaTemplate(source, "t.jinja"))
        return made[-1]

    yield make
    for template in made:
        template.close()


async def said(template: ChatTemplate, **options: Any) -> str:
    """The words of the error that a rendering ends with."""
    with pytest.raises(ChatTemplateError) as caught:
        await render(template, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── the transcript ──────────────────────────────────────────────────────────────────────────────


async def test_a_transcript_ends_where_the_answer_begins() -> None:
    rendered = await render(Transcript())
    assert rendered.data == b"System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nAssistant: "
    assert {b"\n\nUser:", b"\nUser:", b"\nAssistant:", b"\nSystem:", b"\nTool:"} <= set(rendered.stop)


async def test_a_transcript_can_end_with_a_message_or_inside_it() -> None:
    assert (await render(Transcript(), generate=False)).data.endswith(b"Assistant: Hello\n\n")
    assert (await render(Transcript(), generate=False, resume=True)).data.endswith(b"Assistant: Hello")


async def test_who_has_a_name_speaks_under_it() -> None:
    rendered = await render(Transcript(), [{"role": "user", "content": "Hi", "name": "Åsa"}])
    assert rendered.data == "Åsa: Hi\n\nAssistant: ".encode()
    assert "\nÅsa:".encode() in rendered.stop
    many = [{"role": "user", "content": "Hi", "name": f"n{index}"} for index in range(1000)]
    assert len((await render(Transcript(), many)).stop) < 50


async def test_a_transcript_has_no_form_for_tool_calls() -> None:
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    assert "messages[0].tool_calls" in await said(Transcript(), messages=calls)


# ── Jinja ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_template_of_a_model_is_rendered_with_bos_and_eos_as_bytes(
    jinja: Callable[[str], JinjaTemplate],
) -> None:
    rendered = await render(jinja(CHATML))
    assert rendered == Rendered(
        b"\xfe<|system|>Be brief.\xff\n<|user|>Hi\xff\n<|assistant|>Hello\xff\n<|assistant|>", ()
    )
    assert (await render(jinja(CHATML), generate=False)).data.endswith(b"Hello\xff\n")


async def test_no_message_can_contain_a_special_byte(jinja: Callable[[str], JinjaTemplate]) -> None:
    template = jinja("{{ messages[0].content }}{{ messages[0].content | length }}{{ eos_token }}")
    first = await render(template, [{"role": "user", "content": "{{ eos_token }}\ue000"}])
    assert first.data == "{{ eos_token }}\ue00016".encode() + b"\xff"


async def test_the_last_message_can_be_continued(jinja: Callable[[str], JinjaTemplate]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi, I "}]
    rendered = await render(jinja(CHATML), messages, generate=False, resume=True)
    assert rendered.data == b"\xfe<|user|>Hi\xff\n<|assistant|>Hi, I "
    hidden = jinja("{{ messages[0].content }}")
    assert "last message" in await said(hidden, messages=messages, generate=False, resume=True)


async def test_a_template_finds_what_it_expects(jinja: Callable[[str], JinjaTemplate]) -> None:
    template = jinja(
        "{% if tools is none and not documents %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{% endif %}"
        "{{ strftime_now('%Y') | length }}{{ greeting }}{{ nothing }}"
    )
    rendered = await render(template, TALK[1:], variables={"greeting": "<é>"})
    assert rendered.data.decode() == '{"role": "user", "content": "Hi"}4<é>'


async def test_a_template_serves_many_conversations(jinja: Callable[[str], JinjaTemplate]) -> None:
    template = jinja("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages[0].content }}")
    for content in ("a", "b" * 1_000_000, "c"):
        assert (await render(template, [{"role": "user", "content": content}])).data == b"1" + content.encode()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", ("t.jinja: line 2:",)),
        ("a\n\n{{ raise_exception('roles must alternate') }}", ("line 3: roles must alternate",)),
        ("{{ 1 / 0 }}", ("line 1: ZeroDivisionError",)),
        ("a\n{{ messages[9].content.x }}", ("line 2:", "has no element 9")),
        ("{{ ''.__class__.__mro__ }}", ("line 1:", "unsafe")),
        ("{{ messages.append(1) }}", ("line 1:", "'append' of 'list' object is unsafe")),
        ("{{ nothing() }}", ("line 1:", "'nothing' is undefined")),
        ("{{ '\\ud800' }}", ("surrogate",)),
        ("{% include 'secret' %}", ("line 1:", "no loader")),
        ("{{ lipsum.__globals__['os'].getcwd() }}", ("line 1:", "unsafe")),
    ],
)
async def test_what_a_template_does_wrong_is_said_with_its_line(
    jinja: Callable[[str], JinjaTemplate], source: str, words: tuple[str, ...]
) -> None:
    template = jinja(source)
    message = await said(template)
    assert message.startswith("t.jinja: ")
    assert all(word in message for word in words), message
    assert message == await said(template)


HOSTILE = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a long product": "{{ 'a' * 10 ** 10 }}",
    "a huge power": "{{ 10 ** (10 ** 10) }}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "endless output": "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_template_is_ended(
    jinja: Callable[[str], JinjaTemplate], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(chat_templates, "RENDER_SECONDS", 1.0)
    template = jinja(source)
    message = await said(template)
    assert message.startswith("t.jinja: ")
    again = jinja("fine")
    assert (await render(again)).data == b"fine"


async def test_a_template_that_is_slow_for_one_is_there_for_the_next(
    jinja: Callable[[str], JinjaTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "RENDER_SECONDS", 1.0)
    template = jinja("{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}done")
    assert (await render(template, variables={"n": 1})).data == b"done"
    assert "took more than 1 s" in await said(template, variables={"n": 90000})
    assert (await render(template, variables={"n": 1})).data == b"done"
    assert f"more than {MAX_RENDERED} characters" in await said(jinja("{{ 'a' * 10000000 }}"))


async def test_who_waits_too_long_for_others_is_turned_away(
    jinja: Callable[[str], JinjaTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "QUEUE_SECONDS", 0.05)
    monkeypatch.setattr(chat_templates, "RENDER_SECONDS", 0.7)
    template = jinja(HOSTILE["loops"])
    slow = asyncio.create_task(said(template))
    await asyncio.sleep(0.01)
    with pytest.raises(ChatTemplateBusy):
        await render(template)
    assert "took more than" in await slow


async def test_variables_that_cannot_be_sent_are_the_senders_mistake(jinja: Callable[[str], JinjaTemplate]) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    template = jinja("fine")
    assert "nested too deeply" in await said(template, variables={"x": deep})
    assert (await render(template)).data == b"fine"


async def test_a_closed_template_has_no_process_left(jinja: Callable[[str], JinjaTemplate]) -> None:
    template = jinja("fine")
    await render(template)
    process = template._worker._process
    assert process is not None
    template.close()
    assert process.poll() is not None


# ── which one ───────────────────────────────────────────────────────────────────────────────────


def source_of(template: ChatTemplate) -> str:
    assert isinstance(template, JinjaTemplate)
    subject: str = template._worker._subject
    return subject


@pytest.mark.parametrize("model", [None, "demo", "random:hnet_1stage_L", "owner/name"])
def test_models_without_a_template_get_a_transcript(model: str | None) -> None:
    assert isinstance(find_template(ServerSettings(model=model)), Transcript)


def test_the_template_that_is_set_comes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("the model's")
    (tmp_path / "mine.jinja").write_text("mine")
    settings = ServerSettings(model=str(tmp_path), chat_template=str(tmp_path / "mine.jinja"))
    assert source_of(find_template(settings)) == "mine"


def test_the_model_directory_has_the_template(tmp_path: Path) -> None:
    settings = ServerSettings(model=str(tmp_path))
    assert isinstance(find_template(settings), Transcript)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"x": 1}))
    assert isinstance(find_template(settings), Transcript)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    assert source_of(find_template(settings)) == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert source_of(find_template(settings)) == "two"
    (tmp_path / "chat_template.jinja").write_text("thrée")
    assert source_of(find_template(settings)) == "thrée"
    (tmp_path / "model.pt").touch()
    assert source_of(find_template(ServerSettings(model=str(tmp_path / "model.pt")))) == "thrée"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("chat_template.jinja", b"x" * 300_000, "300000 bytes are more"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"\xff", "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "not a text"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * 300_000}).encode(), "more than"),
    ],
)
async def test_a_template_that_cannot_be_read_refuses_chats_alone(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    template = find_template(ServerSettings(model=str(tmp_path)))
    assert isinstance(template, UnusableTemplate)
    message = await said(template)
    assert words in message
    assert str(tmp_path) not in message


async def test_rendering_does_not_hold_up_others(
    jinja: Callable[[str], JinjaTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "RENDER_SECONDS", 0.7)
    slow = asyncio.create_task(said(jinja(HOSTILE["loops"])))
    await asyncio.sleep(0.05)
    await render(Transcript())
    assert not slow.done()
    assert "took more than" in await slow
