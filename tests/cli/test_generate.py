"""`hnet generate`: what its arguments mean, and what reaches the terminal, and when."""

from __future__ import annotations

import os
import pty
import re
import time
from pathlib import Path

import pytest

from hnet_runtime import Engine, SamplingParams
from server.cli.generate import model_and_prompt
from server.cli.loading import load_engine

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.from_pretrained()


def _completion(engine: Engine, prompt: bytes, **params):
    wanted = SamplingParams(**{"max_tokens": 60, "temperature": 0.7, "seed": 1, "return_chunks": True, **params})
    return engine.generate([b"\xfe" + prompt], wanted)[0]


@pytest.mark.parametrize(
    ("arguments", "model", "prompt"),
    [
        ((), None, b""),
        ((PROMPT,), None, PROMPT.encode()),
        (("-",), None, b"typed"),
        (("demo",), "demo", b""),
        (("random:hnet_1stage_L",), "random:hnet_1stage_L", b""),
        (("cartesia-ai/hnet_1stage_L",), "cartesia-ai/hnet_1stage_L", b""),
        (("here",), "here", b""),
        (("elsewhere",), None, b"elsewhere"),
        (("and / or",), None, b"and / or"),
        (("demo", "here"), "demo", b"here"),
        (("here", "-"), "here", b"typed"),
        (("anything", PROMPT), "anything", PROMPT.encode()),
        (("Grüße",), None, "Grüße".encode()),
        ((os.fsdecode(b"caf\xc3"),), None, b"caf\xc3"),
    ],
)
def test_arguments_are_a_model_and_a_prompt(tmp_path, monkeypatch, arguments, model, prompt):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.cli.generate.read_bytes", lambda name: b"typed")
    assert model_and_prompt(arguments) == (model, prompt)


def test_environment_gives_the_model_of_a_lone_prompt(monkeypatch):
    monkeypatch.setenv("HNET_MODEL", "random:hnet_2stage_L")
    assert model_and_prompt((PROMPT,)) == ("random:hnet_2stage_L", PROMPT.encode())
    assert model_and_prompt(()) == ("random:hnet_2stage_L", b"")
    assert model_and_prompt(("demo", PROMPT)) == ("demo", PROMPT.encode())


def test_a_prompt_alone_is_completed_by_the_demo_model(hnet, demo):
    result = hnet("generate", PROMPT, "--max-tokens", "60", "--seed", "1")
    assert (result.code, result.errors) == (0, "")
    assert result.text == _completion(demo, PROMPT.encode()).data.decode() + "\n"
    assert len(re.findall(r"\b(the|a|of|and|to|in|was|that|it)\b", result.text)) >= 3


def test_without_a_seed_every_run_differs(hnet):
    texts = {hnet("generate", PROMPT, "--max-tokens", "60", "--temperature", "1.0").text for _ in range(3)}
    assert len(texts) > 1


def test_options_reach_the_sampler(hnet, demo):
    result = hnet("generate", PROMPT, "--max-tokens", "40", "--temperature", "0")
    assert result.text == _completion(demo, PROMPT.encode(), max_tokens=40, temperature=0.0).data.decode() + "\n"
    options = {"temperature": 1.2, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "seed": 7}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    wanted = _completion(demo, PROMPT.encode(), **options).data.decode()
    assert hnet("generate", PROMPT, "--max-tokens", "60", *flags).text == wanted + "\n"


def test_options_may_come_from_the_environment(hnet, monkeypatch):
    expected = hnet("generate", PROMPT, "--max-tokens", "20", "--seed", "3", "--top-k", "4").raw
    for name, value in {"MAX_TOKENS": "20", "SEED": "3", "TOP_K": "4"}.items():
        monkeypatch.setenv(f"HNET_{name}", value)
    assert hnet("generate", PROMPT).raw == expected


def test_prompt_may_come_from_standard_input(hnet):
    expected = hnet("generate", PROMPT, "--max-tokens", "20", "--seed", "3").raw
    assert hnet("generate", "-", "--max-tokens", "20", "--seed", "3", stdin=PROMPT.encode()).raw == expected
    assert hnet("generate", "demo", "-", "--max-tokens", "20", "--seed", "3", stdin=PROMPT.encode()).raw == expected


def test_echo_shows_the_prompt_first(hnet):
    plain = hnet("generate", PROMPT, "--max-tokens", "20", "--seed", "3").text
    assert hnet("generate", PROMPT, "--max-tokens", "20", "--seed", "3", "--echo").text == PROMPT + plain


def test_a_cut_character_of_the_prompt_is_completed_and_shown_whole(hnet):
    prompt = "It cost 5 €".encode()[:-1]
    result = hnet("generate", "-", "--max-tokens", "20", "--seed", "3", stdin=prompt)
    assert "\ufffd" not in result.text
    assert "\u2080" <= result.text[0] <= "\u20bf"  # begins with the prompt's two bytes


@pytest.mark.parametrize("name", ["a_1stage", "b_2stage"])
def test_raw_bytes_pass_unchanged_where_nobody_watches(hnet, golden_case, name):
    path = golden_case(name).path
    result = hnet("generate", path, PROMPT, "--max-tokens", "60", "--seed", "1", "--utf8", "raw")
    assert result.raw == _completion(Engine.from_pretrained(path), PROMPT.encode(), utf8="raw").data


def test_marks_stand_where_the_model_opened_chunks(hnet, golden_case):
    path = golden_case("b_2stage").path
    completion = _completion(Engine.from_pretrained(path), PROMPT.encode(), max_tokens=40)
    depths: dict[int, int] = {}
    for chunk in completion.chunks:
        depths[chunk.start] = max(depths.get(chunk.start, 0), chunk.stage)
    expected, depth, begun = "", 0, False
    offset = 1
    for character in (PROMPT.encode() + completion.data).decode("utf-8"):
        width = len(character.encode())
        depth = max(depths.get(offset + byte, 0) for byte in range(width))
        expected += "|" * depth * begun + character
        offset, begun = offset + width, True
    assert "||" in expected
    assert hnet("generate", path, PROMPT, "--max-tokens", "40", "--seed", "1", "--chunks").text == expected + "\n"


def test_marks_of_the_completion_alone(hnet):
    both = hnet("generate", PROMPT, "--max-tokens", "40", "--seed", "1", "--chunks").text
    rest = hnet("generate", PROMPT, "--max-tokens", "40", "--seed", "1", "--chunks", "--no-echo").text
    assert both.endswith((rest, "|" + rest))
    assert len(rest.replace("|", "")) == len(both.replace("|", "")) - len(PROMPT)


def test_text_comes_while_the_model_still_writes(hnet_process):
    process = hnet_process("generate", PROMPT, "--max-tokens", "8000", "--seed", "1")
    assert len(process.stdout.read(10)) == 10
    assert process.poll() is None


def test_more_than_the_training_context_is_allowed_and_said(capsys, golden_case):
    engine = load_engine(
        str(golden_case("a_1stage").path), config=None, revision=None, device="cpu", dtype="auto", threads=1,
        max_model_len=9000,
    )  # fmt: skip
    assert engine.info.max_model_len == 9000
    assert "9000 bytes are more than the 8192" in capsys.readouterr().err


def _on_a_terminal(hnet_process, *arguments: str, **environment: str) -> str:
    """What `hnet` writes when its standard output and error are a terminal."""
    ours, theirs = pty.openpty()
    process = hnet_process(*arguments, stdout=theirs, stderr=theirs, environment={"TERM": "xterm", **environment})
    os.close(theirs)
    written = b""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is gone
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(20) == 0
    return written.decode("utf-8", "replace").replace("\r\n", "\n")


def test_a_terminal_gets_the_prompt_and_a_bar_while_loading(hnet_process):
    screen = _on_a_terminal(hnet_process, "generate", PROMPT, "--max-tokens", "20", "--seed", "1")
    assert "loading the demo model" in screen
    assert PROMPT + " " in screen
    assert "|" not in screen.rpartition(PROMPT)[2]


def test_a_terminal_gets_chunks_in_colour(hnet_process):
    screen = _on_a_terminal(hnet_process, "generate", PROMPT, "--max-tokens", "20", "--seed", "1", "--chunks")
    assert re.search(r"Once\x1b\[0m\x1b\[\d\dm upon\x1b\[0m\x1b\[\d\dm a\x1b", screen)


def test_no_color_gives_marks_on_a_terminal_too(hnet_process):
    screen = _on_a_terminal(
        hnet_process, "generate", PROMPT, "--max-tokens", "20", "--seed", "1", "--chunks", NO_COLOR="1"
    )
    assert "Once| upon| a| time" in screen


def test_a_model_cannot_steer_the_terminal(hnet_process, golden_case):
    prompt = "a\x1b[2J\x07b\x7fc"
    screen = _on_a_terminal(hnet_process, "generate", prompt, "--max-tokens", "1", "--seed", "1")
    assert "a␛[2J␇b␡c" in screen


def test_prompts_too_long_for_a_path_are_prompts(hnet):
    assert hnet("generate", "word " * 300, "--max-tokens", "1").code == 0


def test_a_path_given_alone_is_the_model(hnet, golden_case):
    path: Path = golden_case("e_iso_T2").path
    assert hnet("generate", path, "--max-tokens", "5", "--seed", "1").code == 0
