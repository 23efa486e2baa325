"""The official client against the real `hnet serve` on the bundled demo model."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from answers import samples, wait_for
from conftest import ROOT, ServerProcess

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(demo: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def create(client: openai.OpenAI, prompt: Any = PROMPT, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    return client.completions.create(model="demo", prompt=prompt, extra_body=extra, **options)


def test_the_model_says_what_it_is(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert model.model_extra is not None
    assert len(model.model_extra["hnet"]["stages"]) >= 2


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 48, "temperature": 0, "logprobs": 3}
    extra = {"return_token_ids": True, "return_chunks": True}
    whole = create(client, extra=extra, **options).choices[0]
    pieces = [event.choices[0] for event in create(client, extra=extra, stream=True, **options)]
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [item for piece in pieces for item in piece.model_extra["token_ids"]] == whole.model_extra["token_ids"]
    assert [item for piece in pieces for item in piece.model_extra["chunks"]] == whole.model_extra["chunks"]
    assert [item for piece in pieces for item in piece.logprobs.token_logprobs] == whole.logprobs.token_logprobs
    assert [item for piece in pieces for item in piece.logprobs.text_offset] == whole.logprobs.text_offset


def test_a_prompt_read_before_is_found_again_under_its_salt_alone(client: openai.OpenAI, demo: ServerProcess) -> None:
    def ask(salt: str, **options: Any) -> Any:
        answer = create(client, PROMPT * 5, {"cache_salt": salt}, max_tokens=16, temperature=0, **options)
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens

    def metrics() -> dict[str, float]:
        with demo.client() as http:
            return samples(http.get("/metrics").text)

    before = metrics()
    text, length, cached = ask("mine")
    assert cached == 0
    assert ask("mine", n=3) == (text, length, length)
    assert ask("yours") == (text, length, 0)
    after = metrics()
    gained = {name: after[name] - before[name] for name in after if name.startswith("hnet_prefix_cache_")}
    assert gained["hnet_prefix_cache_queries_bytes_total"] >= 3 * length
    assert gained["hnet_prefix_cache_hits_bytes_total"] >= length
    assert after["hnet_prefix_cache_bytes"] > 0


def test_greedy_takes_the_most_probable_byte_and_logprobs_are_a_distribution(client: openai.OpenAI) -> None:
    extra = {"utf8": "raw", "ignore_eos": True}
    choice = create(client, extra=extra, max_tokens=24, temperature=0, logprobs=256).choices[0]
    for key, own, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 256
        assert top[key] == own == max(top.values())
        assert math.fsum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-6)


def test_scoring_a_text_gives_the_numbers_it_was_written_with(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    written = create(client, extra=extra, max_tokens=40, temperature=0.8, seed=7, logprobs=2).choices[0]
    data = [*written.model_extra["prompt_token_ids"], *written.model_extra["token_ids"]]
    read = create(client, [data], extra=extra, max_tokens=0, echo=True, logprobs=2).choices[0]
    assert read.logprobs.token_logprobs[-40:] == written.logprobs.token_logprobs
    assert read.logprobs.top_logprobs[-40:] == written.logprobs.top_logprobs


def test_chunks_of_a_completion_are_those_of_the_text_it_makes(client: openai.OpenAI, demo: ServerProcess) -> None:
    choice = create(client, extra={"return_chunks": True, "return_token_ids": True}, max_tokens=60, seed=3).choices[0]
    data = [*choice.model_extra["prompt_token_ids"], *choice.model_extra["token_ids"]]
    with demo.client() as http:
        stages = http.post("/v1/segment", json={"input": data[:-1]}).json()["stages"]  # the last byte has no verdict
    for stage in stages:
        own = [chunk for chunk in choice.model_extra["chunks"] if chunk["stage"] == stage["stage"]]
        assert [chunk["start"] for chunk in own] == stage["boundaries"]
        assert [chunk["p"] for chunk in own] == stage["probabilities"]


async def test_a_seed_fixes_the_bytes_alone_and_among_fifteen_others(
    client: openai.OpenAI, demo: ServerProcess
) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 11}
    alone = create(client, max_tokens=40, n=2, **options)

    async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60) as crowd:

        async def other(number: int) -> None:
            await asyncio.sleep(0.01 * number)
            prompt = "It was a dark and stormy night. " * (number % 4) + str(number)
            await crowd.completions.create(model="demo", prompt=prompt, max_tokens=5 + 5 * number)

        async def mine() -> str:
            stream = await crowd.completions.create(model="demo", prompt=PROMPT, max_tokens=40, stream=True, **options)
            return "".join([event.choices[0].text async for event in stream])

        text, *_ = await asyncio.gather(mine(), *(other(number) for number in range(15)))
    assert text == alone.choices[0].text
    assert alone.choices[1].text != alone.choices[0].text


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 30])
def test_text_is_well_formed_however_it_is_drawn(client: openai.OpenAI, max_tokens: int) -> None:
    extra = {"return_token_ids": True, "top_k": 0}
    answer = create(client, "Ünïcödé ", extra=extra, max_tokens=max_tokens, temperature=2.0, n=8, seed=1)
    for choice in answer.choices:
        assert bytes(choice.model_extra["token_ids"]).decode() == choice.text
        assert "\ufffd" not in choice.text


def test_a_prompt_that_ends_inside_a_character_is_completed_first(client: openai.OpenAI) -> None:
    prompt = [254, *b"caf", 0xC3]
    choice = create(client, [prompt], extra={"return_token_ids": True}, max_tokens=5, temperature=0).choices[0]
    assert (bytes((0xC3, *choice.model_extra["token_ids"]))).decode() == choice.text


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    free = create(client, max_tokens=40, temperature=0).choices[0].text
    stop = free[10:13]
    choice = create(client, max_tokens=40, temperature=0, stop=[stop]).choices[0]
    assert choice.text == free[: free.index(stop)]
    assert (choice.finish_reason, choice.model_extra["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_byte_ends_the_text(client: openai.OpenAI, included: bool) -> None:
    free = create(client, max_tokens=60, temperature=0).choices[0].text
    extra = {"stop_token_ids": [ord(" ")], "include_stop_str_in_output": included}
    choice = create(client, extra=extra, max_tokens=60, temperature=0).choices[0]
    until = free.index(" ") + included
    assert (choice.text, choice.finish_reason, choice.model_extra["stop_reason"]) == (free[:until], "stop", 32)
    later = create(client, extra={**extra, "min_tokens": 20}, max_tokens=60, temperature=0).choices[0]
    assert " " not in later.text[:20]
    assert len(later.text) >= 20


def test_a_stop_string_may_stay_and_counts_only_after_min_tokens(client: openai.OpenAI) -> None:
    free = create(client, max_tokens=60, temperature=0).choices[0].text
    stop = free[4:6]
    end = free.index(stop) + 2
    kept = create(client, extra={"include_stop_str_in_output": True}, max_tokens=60, temperature=0, stop=stop)
    assert kept.choices[0].text == free[:end]
    again = free.find(stop, end - 1)
    choice = create(client, extra={"min_tokens": end}, max_tokens=60, temperature=0, stop=stop).choices[0]
    # Without EOS, which may not come so soon, the bytes are the free ones up to where it might have.
    assert len(choice.text) > end - 2
    assert choice.text == (free[:again] if again >= 0 else free)


def test_biases_penalties_and_filters_do_what_they_say(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
    assert create(client, logit_bias={"120": 100}, **options).choices[0].text == "x" * 40
    assert "e" not in create(client, logit_bias={"101": -100}, **options).choices[0].text
    assert set(create(client, extra={"allowed_token_ids": [97, 98]}, **options).choices[0].text) == {"a", "b"}
    free = create(client, max_tokens=40, temperature=0).choices[0].text
    word = free[8:11]
    assert word not in create(client, extra={"bad_words": [word]}, max_tokens=40, temperature=0).choices[0].text
    narrow = {"allowed_token_ids": list(b"abcdefgh")}
    plain, spread = (
        create(client, extra=narrow, max_tokens=8, temperature=0, frequency_penalty=penalty).choices[0].text
        for penalty in (-2, 2)
    )
    assert len(set(plain)) < len(set(spread))


def test_logprobs_are_the_models_own_whatever_is_changed(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "repetition_penalty": 1.4}
    written = create(client, extra=extra, max_tokens=30, temperature=0, logprobs=2, presence_penalty=1).choices[0]
    data = [*written.model_extra["prompt_token_ids"], *written.model_extra["token_ids"]]
    read = create(client, [data], extra={"prompt_logprobs": 2}, max_tokens=0, echo=True, logprobs=2).choices[0]
    assert read.logprobs.token_logprobs[-30:] == written.logprobs.token_logprobs
    for byte, entry, own in zip(
        data[1:], read.model_extra["prompt_logprobs"][1:], read.logprobs.token_logprobs[1:], strict=True
    ):
        assert entry[str(byte)]["logprob"] == own
        above = sum(other["logprob"] > own for other in entry.values())
        assert entry[str(byte)]["rank"] > above


def test_rules_that_leave_no_byte_end_the_choice_with_an_error_that_says_so(client: openai.OpenAI) -> None:
    choice = create(client, extra={"allowed_token_ids": [0x80]}, max_tokens=5).choices[0]
    assert (choice.text, choice.finish_reason) == ("", "error")
    assert "no byte may come" in choice.model_extra["error"]


def test_the_best_of_several_is_the_most_probable_of_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 5, "logprobs": 0}
    every = create(client, n=6, **options).choices
    (best,) = create(client, n=1, best_of=6, **options).choices
    means = [math.fsum(c.logprobs.token_logprobs) / max(len(c.logprobs.token_logprobs), 1) for c in every if c.text]
    assert best.text == [c for c in every if c.text][means.index(max(means))].text


def test_a_client_that_goes_away_frees_its_row(demo: ServerProcess) -> None:
    aborted = 'hnet_request_finished_total{reason="abort"}'
    with demo.client() as http:
        before = samples(http.get("/metrics").text)[aborted]
        with http.stream(
            "POST",
            "/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 8000, "stream": True, "ignore_eos": True},
        ) as live:
            pieces = live.iter_text()  # kept: an iterator that is dropped closes its response
            next(pieces)
            assert samples(http.get("/metrics").text)["hnet_num_requests_running"] == 1
        wait_for(lambda: samples(http.get("/metrics").text)["hnet_num_requests_running"] == 0)
        assert samples(http.get("/metrics").text)[aborted] == before + 1


def test_odd_prompts_are_answered(demo: ServerProcess) -> None:
    prompts: list[Any] = ["", "T" * 300, "\x00", "😀" * 50, [255], [254] * 20, [0xFF, 0xC3], list(range(256))]
    with httpx.Client(base_url=demo.url, timeout=60, trust_env=False) as http:
        for prompt in prompts:
            for utf8 in ("strict", "raw"):
                body = {"prompt": prompt, "max_tokens": 8, "utf8": utf8, "echo": True, "logprobs": 1}
                answer = http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_api_process_has_no_tensors(demo: ServerProcess) -> None:
    maps = Path(f"/proc/{demo.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "numpy" not in maps


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli.main", "serve", str(tmp_path / "nothing"), "--port", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("hnet serve: loading")]
    assert len(lines) == 1
    assert lines[0].startswith("hnet: error: ")
    assert str(tmp_path / "nothing") in lines[0]
