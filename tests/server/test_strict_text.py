"""`utf8: "strict"` at its word: thousands of continuations of a model that knows nothing, every one of them text.

Their bytes decode strictly and are those of the text, whatever else a request asks for. What a stop, an abort or an
error cuts off inside a character is no part of the text, and nothing but that is missing.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from answers import events
from conftest import Running
from safetensors.torch import save_file

from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Output, Request, SamplingParams
from hnet_runtime.model.hierarchy import HNet
from server.choice import Choice, ChoiceOptions
from server.cli.serve import ENGINE_FACTORY, engine_arguments
from server.settings import ServerSettings
from tests.wild import DOCUMENT, wild

MANY = 10_000
CUTS = {"stop", "abort", "error"}  # ends that may come inside a character
PROMPTS = [b"\xfeab", b"\xfe" + "né".encode(), b"\xfea\xc3", b"\xfe\xe4\xb8", b"\xfe\xf0\x9f", "世界".encode()]
SHAPES: list[dict[str, Any]] = [
    {},
    {"ignore_eos": True},
    {"bad_words": (b"\x80", "é".encode(), "世".encode(), b"ab")},
    {"bad_words": tuple(bytes((byte,)) for byte in range(0xA0, 0xC0))},
    {"allowed_token_ids": (*range(0x80, 0x90), 0xC3, 0xE4, 0xF1, 0xFF)},
    {"allowed_token_ids": (0x61, 0x80, 0xE4)},
    {"allowed_token_ids": (0xE4, 0xFF)},  # a character that cannot be finished is an error
    {"stop_token_ids": tuple(range(0x80, 0xC0, 3))},
    {"stop_token_ids": tuple(range(0x80, 0xC0, 5)), "include_stop_str_in_output": True},
    {"stop_token_ids": tuple(range(0xC2, 0xF5)), "min_tokens": 3},
    {"stop": (b"\x80", b"\xbf\x80", b"\x85\xc3", b"\xe4\xb8"), "include_stop_str_in_output": True},
    {"stop": (b"\x81", b"\xf1\x90"), "min_tokens": 2, "bad_words": (b"\x82\x80",)},
    {"logit_bias": tuple((byte, 5.0) for byte in range(0xF0, 0xF5)), "repetition_penalty": 1.3},
    {"top_k": 3, "frequency_penalty": 1.0, "temperature": 2.0},
]


def request(number: int) -> Request:
    """Every shape with every prompt, with room for 1 to 8 bytes."""
    params = {"max_tokens": 1 + number % 8, "temperature": 1.3, "seed": number, **SHAPES[number % len(SHAPES)]}
    params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
    prompt = PROMPTS[number // len(SHAPES) % len(PROMPTS)]
    return Request(request_id=str(number), prompt=prompt, params=SamplingParams(**params))


def assert_text(prompt: bytes, data: bytes, text: str, finish_reason: str | None) -> bool:
    """Holds text against bytes; whether a character was cut."""
    begun = codecs.getincrementaldecoder("utf-8")("replace")
    begun.decode(prompt.removeprefix(b"\xfe"))
    lead = begun.getstate()[0]  # of a character that the prompt began
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    assert decoder.decode(lead + data) == text  # raises for what no text has
    cut = decoder.getstate()[0]
    assert not cut or finish_reason in CUTS or lead == cut[: len(lead)] != b"", (prompt, data)
    return bool(cut)


def test_ten_thousand_continuations_decode_strictly_and_are_their_text() -> None:
    threads = torch.get_num_threads()
    config, weights = wild()
    settings = EngineConfig(
        max_num_seqs=256, max_model_len=32, threads=1, prefill_bytes_per_tick=512, prefill_share=1.0
    )
    engine = Engine(HNet(config, weights), config=settings)
    requests = [request(number) for number in range(MANY)]
    choices = {item.request_id: Choice(0, item.prompt, ChoiceOptions(return_token_ids=True)) for item in requests}
    data, texts = dict.fromkeys(choices, b""), dict.fromkeys(choices, "")
    for item in requests:
        engine.submit(item)
    reasons: Counter[str] = Counter()
    cuts = 0
    while engine.has_work:
        outputs: Sequence[Output] = engine.tick().outputs
        for output in outputs:
            name, choice = output.request_id, choices[output.request_id]
            choice.add(output)
            shown = choice.take()
            if shown is not None:
                texts[name] += shown["text"]
                data[name] += bytes(shown["token_ids"])
            if output.finish_reason is not None:
                reasons[output.finish_reason] += 1
                cuts += assert_text(requests[int(name)].prompt, data[name], texts[name], output.finish_reason)
            elif int(name) % 9 == 0 and choice.num_bytes == int(name) % 5 + 1:
                engine.abort(name)
    torch.set_num_threads(threads)
    assert sum(reasons.values()) == MANY
    assert min(reasons[reason] for reason in ("stop", "length", "abort", "error")) > 100, reasons
    assert cuts > 300
    assert sum(not text.isascii() for text in texts.values()) > MANY / 3


@pytest.fixture
def server(tmp_path: Path, serve_in_thread: Callable[..., Running]) -> Running:
    """A server in this process on the same model."""
    (tmp_path / "config.json").write_text(json.dumps(DOCUMENT))
    save_file(wild()[1], tmp_path / "model.safetensors")
    settings = ServerSettings(model=str(tmp_path), max_num_seqs=64, max_model_len=64, threads=1)
    return serve_in_thread(factory=ENGINE_FACTORY, **engine_arguments(settings))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_token_ids": list(range(0x80, 0xC0, 3)), "include_stop_str_in_output": True},
        {"bad_words": ["é", "\x80"], "allowed_token_ids": [0x61, *range(0x80, 0xC0), 0xC2, 0xE4, 0xF1]},
    ],
    ids=["free", "stop bytes", "filters"],
)
def test_a_hundred_streams_are_text_event_by_event(server: Running, options: dict[str, Any]) -> None:
    prompts = [list(prompt) for prompt in PROMPTS[:4]]
    body = {"prompt": prompts, "n": 32, "max_tokens": 11, "temperature": 1.3, "seed": 5, "ignore_eos": True, **options}
    with server.client() as client:
        answer: httpx.Response = client.post("/v1/completions", json={**body, "stream": True, "return_token_ids": True})
    data, texts = [b""] * 128, [""] * 128
    ends: dict[int, str] = {}
    for event in events(answer.text):
        (choice,) = event["choices"]
        index = choice["index"]
        texts[index] += choice["text"]
        data[index] += bytes(choice["token_ids"])
        if choice["finish_reason"] is not None:
            ends[index] = choice["finish_reason"]
    assert len(ends) == 128
    for index, reason in ends.items():
        assert_text(PROMPTS[index // 32], data[index], texts[index], reason)
    assert sum(not text.isascii() for text in texts) > 60
