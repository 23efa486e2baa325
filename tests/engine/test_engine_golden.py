"""The engine on the golden models: the recorded greedy bytes, verdicts and log-probabilities, however it batches."""

from __future__ import annotations

import pytest
import torch

BUDGETS = [1, 7, 64, 100_000]  # prefill_bytes_per_tick
GREEDY = {"temperature": 0.0, "ignore_eos": True, "utf8": "raw"}


def prompt_bytes(prompt) -> bytes:
    return bytes(prompt.ids.tolist())


def recorded_chunks(prompt, length: int) -> list[tuple[int, int, float]]:
    """(start, stage, p) of every boundary of the record over the first `length` bytes fed."""
    chunks = []
    offsets = torch.arange(len(prompt.fed_ids))
    for stage, (p, boundary) in enumerate(zip(prompt.fed_probabilities, prompt.fed_boundaries, strict=True), start=1):
        chunks += [
            (int(offset), stage, float(value))
            for offset, value, opens in zip(offsets, p, boundary, strict=True)
            if opens and offset < length
        ]
        offsets = offsets[boundary]
    return sorted(chunks)


def assert_logprobs(entries, data: bytes, logits: torch.Tensor, atol: float) -> None:
    exact = torch.log_softmax(logits.double(), -1)
    assert [entry.byte for entry in entries] == list(data)
    if not entries:
        return
    bytes_of = torch.tensor([[byte for byte, _ in entry.top] for entry in entries])
    values = torch.tensor([[value for _, value in entry.top] for entry in entries], dtype=torch.float64)
    assert torch.equal(bytes_of.sort(-1).values, torch.arange(256).expand(len(entries), 256))
    assert (values.diff(dim=-1) <= 0).all()
    assert float((values - exact.gather(-1, bytes_of)).abs().max()) <= 2 * atol
    assert all(dict(entry.top)[entry.byte] == entry.logprob for entry in entries)


@pytest.mark.parametrize("budget", BUDGETS)
def test_all_prompts_together_give_the_recorded_bytes_verdicts_and_logprobs(fp32_golden, driver_of, budget):
    driver = driver_of(fp32_golden.name, prefill_bytes_per_tick=budget)
    for prompt in fp32_golden.prompts():
        driver.submit(
            str(prompt.index),
            prompt_bytes(prompt),
            max_tokens=65,
            logprobs=256,
            prompt_logprobs=256,
            return_chunks=True,
            **GREEDY,
        )
    for request_id, gathered in driver.run().items():
        prompt = fp32_golden.prompt(int(request_id))
        length = len(prompt.ids)
        assert gathered.data == bytes(prompt.decode_tokens.tolist())
        assert gathered.finish_reason == "length"
        assert_logprobs(gathered.logprobs, gathered.data, prompt.fed_logits[length - 1 :], fp32_golden.logits_atol)
        assert_logprobs(
            gathered.prompt_logprobs, prompt_bytes(prompt)[1:], prompt.prefill_logits[:-1], fp32_golden.logits_atol
        )
        expected = recorded_chunks(prompt, length + 64)  # the last byte is never fed, and has no verdict
        assert [(chunk.start, chunk.stage) for chunk in gathered.chunks] == [entry[:2] for entry in expected]
        for chunk, (_, _, p) in zip(gathered.chunks, expected, strict=True):
            assert abs(chunk.p - p) <= fp32_golden.probability_atol
        stages = fp32_golden.config.num_routed_stages
        usage = gathered.last.usage
        assert usage.chunks == tuple(sum(chunk.stage == s + 1 for chunk in gathered.chunks) for s in range(stages))
        assert (usage.prompt_bytes, usage.completion_bytes) == (length, 65)


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_rows_than_requests_serve_them_one_after_another(fp32_golden, driver_of, rows):
    driver = driver_of(fp32_golden.name, max_num_seqs=rows)
    for prompt in fp32_golden.prompts():
        driver.submit(str(prompt.index), prompt_bytes(prompt), max_tokens=30, **GREEDY)
    finished = []
    while driver.engine.has_work:
        tick = driver.tick()
        assert tick.stats.running <= rows
        assert sum(record.rows for record in tick.stats.steps if record.kind == "byte") <= rows
        finished += [output.request_id for output in tick.outputs if output.finish_reason]
    if rows == 1:
        assert finished == ["0", "1", "2", "3"]
    for request_id, gathered in driver.gathered.items():
        assert gathered.data == bytes(fp32_golden.prompt(int(request_id)).decode_tokens[:30].tolist())


def test_a_prompt_that_ends_in_the_middle_of_the_record_continues_it(fp32_golden, driver_of):
    driver = driver_of(fp32_golden.name)
    prompt = fp32_golden.prompt(1)
    fed = bytes(prompt.fed_ids.tolist())
    for cut in (1, 31, 64):
        gathered = driver.alone(fed[: len(prompt.ids) + cut], max_tokens=65 - cut, **GREEDY)
        assert gathered.data == bytes(prompt.decode_tokens[cut:].tolist())


def test_bfloat16_follows_the_record_for_as_long_as_no_tie_divides_them(bf16_golden, driver_of):
    driver = driver_of(bf16_golden.name)
    agreed = 0
    for prompt in bf16_golden.prompts():
        found = driver.alone(prompt_bytes(prompt), max_tokens=65, **GREEDY).data
        recorded = bytes(prompt.decode_tokens.tolist())
        agreed += next((i for i, (a, b) in enumerate(zip(found, recorded, strict=True)) if a != b), 65)
    assert agreed >= 4 * 10


def test_a_prompt_alone_is_scored_with_max_tokens_0(fp32_golden, driver_of):
    for budget in (5, 1000):
        driver = driver_of(fp32_golden.name, prefill_bytes_per_tick=budget)
        for prompt in fp32_golden.prompts():
            gathered = driver.alone(prompt_bytes(prompt), max_tokens=0, prompt_logprobs=256, return_chunks=True)
            assert (gathered.data, gathered.finish_reason, gathered.logprobs) == (b"", "length", [])
            assert_logprobs(
                gathered.prompt_logprobs, prompt_bytes(prompt)[1:], prompt.prefill_logits[:-1], fp32_golden.logits_atol
            )
            expected = recorded_chunks(prompt, len(prompt.ids))
            assert [(chunk.start, chunk.stage) for chunk in gathered.chunks] == [entry[:2] for entry in expected]


def test_stats_count_every_byte_and_chunk(fp32_golden, driver_of):
    driver = driver_of(fp32_golden.name, prefill_bytes_per_tick=50, prefix_cache_memory=0)
    for prompt in fp32_golden.prompts():
        driver.submit(str(prompt.index), prompt_bytes(prompt), max_tokens=12, return_chunks=True, **GREEDY)
    driver.run()
    stats = driver.ticks[-1].stats
    assert stats.prompt_bytes_total == sum(len(prompt.ids) for prompt in fp32_golden.prompts())
    assert stats.generation_bytes_total == 4 * 12
    told = [chunk.stage for gathered in driver.gathered.values() for chunk in gathered.chunks]
    assert stats.chunks_total == tuple(told.count(s + 1) for s in range(fp32_golden.config.num_routed_stages))
    assert (stats.running, stats.waiting, stats.rows_in_use, stats.kv_in_use) == (0, 0, 0.0, 0.0)
    first = driver.ticks[0].stats
    assert first.running == 4
    assert first.rows_in_use == 0.25
    records = [record for tick in driver.ticks for record in tick.stats.steps]
    assert sum(r.rows for r in records if r.kind == "prefill" and r.stage == 0) == stats.prompt_bytes_total
    assert sum(r.rows for r in records if r.kind == "byte") == 4 * 11  # the last byte is never fed
    for stage in range(1, fp32_golden.config.num_routed_stages + 1):
        assert sum(r.rows for r in records if r.stage == stage) == stats.chunks_total[stage - 1]
