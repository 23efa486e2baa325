"""What bad input and bad numbers get: an error of their own, and nobody else notices."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from hnet_runtime.engine.config import EngineConfig, EngineError
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import SamplingParams
from hnet_runtime.engine.request import RequestError
from hnet_runtime.engine.runner import Runner
from hnet_runtime.model.hierarchy import HNet
from tests import courses

PARAMS: dict[str, Any] = {
    "temperature": 0.0,
    "max_tokens": 20,
    "ignore_eos": True,
    "logprobs": 1,
    "return_chunks": True,
}
TEXTS = [b"\xfeThe first", b"\xfeand the second", b"\xfe", b"\xfe" + b"a longer one " * 6]
NAN, INF = float("nan"), float("inf")


_EXPECTED: list[tuple[Any, ...]] = []


@pytest.fixture
def expected(driver_of) -> list[tuple[Any, ...]]:
    """What each text gets where nothing goes wrong: computed once."""
    if not _EXPECTED:
        driver = driver_of("b_2stage")
        _EXPECTED.extend(driver.alone(text, **PARAMS).substance for text in TEXTS)
    return _EXPECTED


# ── numbers that are not finite ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_row_whose_logits_are_not_finite_ends_with_an_error_and_no_other(
    driver_of, monkeypatch, expected, value, everywhere, at
):
    driver = driver_of("b_2stage", prefill_bytes_per_tick=1000)
    calls = 0
    step, prefill = HNet.step, Runner.prefill

    @torch.inference_mode()
    def spoil(logits: torch.Tensor) -> None:
        if everywhere:
            logits[:] = value
        else:
            logits[200] = value

    def spoiled_step(self, state, rows, data, **how):
        nonlocal calls
        result = step(self, state, rows, data, **how)
        ended = [row for row, is_finished in zip(rows, result.finished, strict=True) if is_finished]
        if 2 in ended:
            calls += 1
            if calls == at:
                spoil(result.logits[ended.index(2)])
        return result

    def spoiled_prefill(self, rows, pieces, num_logits):
        result = prefill(self, rows, pieces, num_logits)
        if at == 0 and 2 in rows:
            spoil(result.logits[list(rows).index(2)][-1])
        return result

    monkeypatch.setattr(HNet, "step", spoiled_step)
    monkeypatch.setattr(Runner, "prefill", spoiled_prefill)
    for index, text in enumerate(TEXTS):
        driver.submit(str(index), text, **PARAMS)  # number 1 gets row 2
    driver.run()
    failed = driver.gathered["1"]
    assert failed.finish_reason == "error"
    assert "not finite" in failed.last.error
    assert "\n" not in failed.last.error
    assert failed.data == expected[1][0][:at]
    for index in (0, 2, 3):
        assert driver.gathered[str(index)].substance == expected[index]
    assert driver.engine.check() is None


def poison_row(engine, row: int) -> None:
    """The row's recurrent state becomes NaN, as a defect of a kernel might leave it."""
    for stage in engine._loop._runner.state.stages:
        for layers in stage.stacks.values():
            for layer in layers:
                if hasattr(layer, "ssm"):
                    layer.ssm[row] = NAN
                    layer.conv[row] = NAN
        if stage.router is not None:
            stage.router[row] = NAN
            stage.ema[row] = NAN


def test_a_row_whose_state_is_spoiled_ends_and_leaves_its_row_clean(driver_of, expected):
    driver = driver_of("b_2stage", max_num_seqs=4)
    for index, text in enumerate(TEXTS):
        driver.submit(str(index), text, **PARAMS)
    for _ in range(6):
        driver.tick()
    poison_row(driver.engine, 2)
    driver.submit("next", TEXTS[3], **PARAMS)  # will have row 2 after it
    driver.run()
    assert driver.gathered["1"].finish_reason == "error"
    assert driver.gathered["1"].data == expected[1][0][: len(driver.gathered["1"].data)]
    for index in (0, 2, 3):
        assert driver.gathered[str(index)].substance == expected[index]
    assert driver.gathered["next"].substance == expected[3]


@pytest.mark.parametrize("params", [{}, {"prompt_logprobs": 1}, {"prompt_logprobs": 1, "max_tokens": 5}])
@pytest.mark.parametrize("budget", [2, 1000])
def test_a_prompt_whose_numbers_are_not_finite_is_an_error_even_if_only_scored(driver_of, monkeypatch, params, budget):
    """NaN is never handed out as a log-probability, and max_tokens 0 does not hide it."""
    driver = driver_of("a_1stage", prefill_bytes_per_tick=budget)
    prefill = Runner.prefill

    @torch.inference_mode()
    def spoiled(self, rows, pieces, num_logits):
        result = prefill(self, rows, pieces, num_logits)
        for logits in result.logits:
            logits[-1:, 3] = NAN
        return result

    monkeypatch.setattr(Runner, "prefill", spoiled)
    gathered = driver.alone(b"\xfe" + b"abcdefgh" * 4, **{"max_tokens": 0, **params})
    assert (gathered.finish_reason, gathered.data) == ("error", b"")
    assert all(entry.logprob == entry.logprob for entry in gathered.prompt_logprobs)


# ── requests that cannot be served ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": NAN}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": NAN}, "min_p"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 257}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 257}, "prompt_logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": NAN}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": INF}, "repetition_penalty"),
        ({"logit_bias": ((256, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((3, 100.1),)}, "logit_bias"),
        ({"logit_bias": ((3, NAN),)}, "logit_bias"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": (256,)}, "allowed_token_ids"),
        ({"bad_words": (b"a", b"")}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop": (b"a", b"")}, "stop"),
        ({"utf8": "loose"}, "utf8"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_its_name(driver_of, params, param):
    driver = driver_of("e_iso_T2")
    with pytest.raises(RequestError) as refused:
        driver.submit("r", b"\xfe", **params)
    assert refused.value.param == param
    assert param in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not driver.engine.has_work


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [
        (0, 1, "prompt"),
        (101, 0, "prompt"),
        (101, 1, "prompt"),
        (100, 1, "prompt"),
        (99, 2, "max_tokens"),
        (1, 100, "max_tokens"),
        (1, 2**70, "max_tokens"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_by_the_parameter_to_blame(driver_of, length, max_tokens, param):
    driver = driver_of("e_iso_T2", max_model_len=100)
    with pytest.raises(RequestError) as refused:
        driver.submit("r", b"x" * length, max_tokens=max_tokens)
    assert refused.value.param == param
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("length", "max_tokens"), [(100, 0), (99, 1), (1, 99), (50, 50)])
def test_a_prompt_that_just_fits_is_served_to_its_end(driver_of, length, max_tokens):
    driver = driver_of("b_2stage", max_model_len=100)
    gathered = driver.alone(b"\xfe" + b"T" * (length - 1), max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    assert (len(gathered.data), gathered.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize("name", ["b_2stage", "e_iso_T2"])
def test_a_context_that_ends_inside_a_page_or_a_ring_is_served_exactly(driver_of, golden_case, name):
    case = golden_case(name)
    prompt = case.prompt(1)
    most = len(prompt.ids) + 65
    for length in (most, most + 1, most + 63, 512):  # windows are rings or pages by it
        driver = driver_of(name, max_model_len=length)
        gathered = driver.alone(bytes(prompt.ids.tolist()), temperature=0.0, max_tokens=65, ignore_eos=True, utf8="raw")
        assert gathered.data == bytes(prompt.decode_tokens.tolist())


def test_an_id_in_use_is_refused_and_the_first_goes_on(driver_of):
    driver = driver_of("e_iso_T2")
    driver.submit("r", b"\xfe", max_tokens=3, ignore_eos=True)
    kept = driver.gathered["r"]
    with pytest.raises(RequestError) as refused:
        driver.submit("r", b"\xfe")
    assert refused.value.param == "request_id"
    driver.gathered["r"] = kept
    assert len(driver.run()["r"].data) == 3


@pytest.mark.parametrize("batching", ["lockstep", "aligned", "adaptive"])
def test_requests_that_run_out_of_kv_pages_get_what_they_get_alone(golden_case, driver_class, keep_threads, batching):
    """Every byte is a chunk of every stage, and three pages are for one row and a half."""
    case = golden_case("b_2stage")
    model = HNet(case.config, case.weights, courses.CHUNKY)
    one_page = 64 * 2 * 2 * 128 * 4  # of the main network: keys and values of two layers of width 128, fp32

    def driver(**settings: Any) -> Any:
        config = EngineConfig(max_model_len=192, max_num_seqs=4, threads=1, **settings)
        return driver_class(Engine(model, config=config))

    params = {"max_tokens": 30, "ignore_eos": True, "temperature": 0.0, "return_chunks": True}
    texts = [b"\xfe" + b"T" * 50, b"\xfe" + b"abc" * 15]
    expected = [driver(batching="lockstep").alone(text, **params).substance for text in texts]
    tight = driver(kv_memory=3 * one_page, batching=batching)
    for index in range(4):
        tight.submit(str(index), texts[index % 2], **params)
    tight.run()
    stats = tight.ticks[-1].stats
    assert sum(gathered.last.usage.preemptions for gathered in tight.gathered.values()) == stats.preemptions_total > 0
    assert max(tick.stats.running for tick in tight.ticks) > 1
    assert max(tick.stats.kv_in_use for tick in tight.ticks) == 1.0
    assert stats.kv_in_use == 0.0
    for index in range(4):
        assert tight.gathered[str(index)].substance == expected[index % 2]


# ── parameters that are odd but allowed ───────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-310, "top_p": 0.5},
        {"temperature": 1e308},
        {"top_k": 2**80},
        {"top_p": 5e-324},
        {"min_p": 1.0},
        {"seed": 2**200},
        {"seed": -(2**63)},
        {"logprobs": 256},
    ],
)
@pytest.mark.parametrize("utf8", ["strict", "raw"])
def test_an_extreme_parameter_is_served(driver_of, params, utf8):
    driver = driver_of("b_2stage")
    beside = driver.alone(TEXTS[0], **PARAMS).substance
    driver.submit("odd", TEXTS[1], max_tokens=20, ignore_eos=True, utf8=utf8, **params)
    driver.submit("beside", TEXTS[0], **PARAMS)
    driver.run()
    assert len(driver.gathered["odd"].data) == 20
    assert driver.gathered["beside"].substance == beside
    if params.get("temperature", 1.0) < 1e-300:
        greedy = driver.alone(TEXTS[1], max_tokens=20, ignore_eos=True, utf8=utf8, temperature=0.0)
        assert driver.gathered["odd"].data == greedy.data


@pytest.mark.parametrize(
    "field",
    [
        *("max_num_seqs", "max_model_len", "prefill_bytes_per_tick", "kv_memory", "threads"),
        *("max_park_ticks", "max_park_seconds", "prefill_share", "prefix_cache_interval"),
    ],
)
def test_a_setting_below_one_is_refused_by_its_name(field):
    with pytest.raises(EngineError, match=field):
        EngineConfig(**{field: 0})


@pytest.mark.parametrize(
    ("setting", "value"), [("prefix_cache_memory", -1), ("batching", "random"), ("prefill_share", 1.5)]
)
def test_a_setting_out_of_range_is_refused_by_its_name(setting, value):
    with pytest.raises(EngineError, match=setting):
        EngineConfig(**{setting: value})


def test_a_wait_that_several_lanes_could_not_keep_is_refused_by_its_name(driver_of):
    with pytest.raises(EngineError, match="max_park_ticks must be at least 2"):
        driver_of("b_2stage", max_park_ticks=1)


@pytest.mark.parametrize("kv_memory", [1, 1000, 7 * 64 * 2 * 2 * 128 * 4])
def test_too_little_kv_memory_for_one_request_is_refused(driver_of, kv_memory):
    with pytest.raises(EngineError, match="kv_memory"):
        driver_of("b_2stage", max_model_len=512, kv_memory=kv_memory)


def test_params_survive_the_journey_between_processes():
    params = SamplingParams(
        stop=(b"\xff\x00", b"a"),
        seed=-5,
        utf8="raw",
        logprobs=0,
        logit_bias=((3, -1.5),),
        allowed_token_ids=(1, 255),
        bad_words=(b"\xff",),
        stop_token_ids=(10,),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
