"""The engine embedded in a program: `from hnet_runtime import Engine`."""

from __future__ import annotations

import pytest

from hnet_runtime import Engine, EngineConfig, SamplingParams
from hnet_runtime.engine.config import EngineError
from hnet_runtime.engine.messages import Request
from hnet_runtime.engine.request import RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, utf8="raw")


def bound_ticks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that lost its last Output would tick for ever."""
    tick, count = engine._loop.tick, 0

    def bounded():
        nonlocal count
        count += 1
        assert count < 200, "a stream waits for what will never come"
        return tick()

    monkeypatch.setattr(engine._loop, "tick", bounded)


@pytest.fixture
def engine(driver_of) -> Engine:
    return driver_of("b_2stage", max_num_seqs=3).engine


@pytest.fixture
def prompts(golden_case) -> list[bytes]:
    return [bytes(prompt.ids.tolist()) for prompt in golden_case("b_2stage").prompts()]


@pytest.fixture
def recorded(golden_case) -> list[bytes]:
    return [bytes(prompt.decode_tokens[:20].tolist()) for prompt in golden_case("b_2stage").prompts()]


def test_generate_returns_completions_in_order(engine, prompts, recorded):
    found = engine.generate(prompts, GREEDY)
    assert [completion.data for completion in found] == recorded
    assert all(completion.finish_reason == "length" for completion in found)
    assert not engine.has_work
    engine.check()


def test_generate_takes_params_of_each_prompt(engine, prompts, recorded):
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, utf8="raw", logprobs=2) for n in (3, 9)]
    first, second = engine.generate(prompts[:2], params)
    assert (first.data, second.data) == (recorded[0][:3], recorded[1][:9])
    assert [len(first.logprobs), len(second.logprobs)] == [3, 9]
    with pytest.raises(ValueError, match="2 prompts, but 1 SamplingParams"):
        engine.generate(prompts[:2], params[:1])
    assert engine.generate([]) == []


def test_stream_yields_what_is_gained_and_ends(engine, prompts, recorded):
    outputs = list(engine.stream(prompts[1], GREEDY))
    assert b"".join(output.data for output in outputs) == recorded[1]
    assert len(outputs) == 20
    assert [output.finish_reason for output in outputs] == [None] * 19 + ["length"]


def test_a_stream_that_is_left_frees_its_row(engine, prompts):
    for output in engine.stream(prompts[1], GREEDY):
        assert output.data
        break
    engine.tick()
    assert not engine.has_work
    engine.check()


def test_streams_side_by_side_lose_nothing(engine, prompts, recorded, monkeypatch):
    bound_ticks(engine, monkeypatch)
    streams = [engine.stream(prompt, GREEDY) for prompt in prompts[:2]]
    texts = [b"", b""]
    for outputs in zip(*streams, strict=True):
        for index, output in enumerate(outputs):
            texts[index] += output.data
    assert texts == recorded[:2]


def test_generate_in_the_middle_of_a_stream_takes_nothing_from_it(engine, prompts, recorded, monkeypatch):
    bound_ticks(engine, monkeypatch)
    stream = engine.stream(prompts[0], GREEDY)
    text = next(stream).data
    (completion,) = engine.generate([prompts[1]], SamplingParams(temperature=0.0, max_tokens=6, utf8="raw"))
    assert completion.data == recorded[1][:6]
    text += b"".join(output.data for output in stream)
    assert text == recorded[0]


def test_generate_takes_nothing_from_submitted_requests(engine, prompts, recorded):
    engine.submit(Request(request_id="mine", prompt=prompts[0], params=GREEDY))
    engine.generate([prompts[1]], GREEDY)
    gained = b""
    while engine.has_work:
        gained += b"".join(output.data for output in engine.tick().outputs if output.request_id == "mine")
    assert gained == recorded[0]


def test_generate_leaves_nothing_behind_where_a_prompt_is_refused(engine, prompts):
    with pytest.raises(RequestError) as refused:
        engine.generate([prompts[0], b""], GREEDY)
    assert refused.value.param == "prompt"
    engine.tick()
    assert not engine.has_work
    engine.check()


def test_info_describes_the_model(engine):
    info = engine.info
    assert (info.dtype, info.device, info.max_num_seqs, info.max_model_len) == ("float32", "cpu", 3, 512)
    assert [(stage.stage, stage.d_model, stage.layout) for stage in info.stages] == [
        (0, 64, "m2 · m2"),
        (1, 96, "T1m1 · m1T1"),
        (2, 128, "T2"),
    ]
    total = sum(stage.parameters for stage in info.stages) + info.embedding_parameters
    assert total == engine.model.config.num_parameters


def test_the_demo_model_is_the_default_and_writes_text(keep_threads):
    engine = Engine.from_pretrained(engine_config=EngineConfig(max_num_seqs=2, max_model_len=256))
    params = SamplingParams(temperature=0.0, max_tokens=60)
    (completion,) = engine.generate([b"\xfeOnce upon a time"], params)
    text = completion.data.decode("utf-8", "strict")
    assert len(text.split()) >= 5
    assert engine.info.dtype == "float32"
    assert engine.info.model


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "abacus"}, "abacus"), ({"device": "meta"}, "meta"), ({"dtype": "float16"}, "float16")],
)
def test_a_device_or_dtype_there_is_not_is_named(options, message):
    with pytest.raises(EngineError, match=message):
        Engine.from_pretrained(**options)
