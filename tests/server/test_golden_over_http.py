"""The authors' numbers, through HTTP: what a client sees is what the reference computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import Running

from server.cli.serve import ENGINE_FACTORY, engine_arguments
from server.settings import ServerSettings


def complete(running: Running, ids: list[int], **options: Any) -> dict[str, Any]:
    body = {
        "prompt": ids,
        "temperature": 0,
        "ignore_eos": True,
        "utf8": "raw",
        "logprobs": 256,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "return_chunks": True,
        "echo": True,
        **options,
    }
    with running.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]  # type: ignore[no-any-return]


def test_bytes_logprobs_and_chunks_are_the_references(
    fp32_golden: Any, serve_in_thread: Callable[..., Running]
) -> None:
    settings = ServerSettings(model=str(fp32_golden.path), max_num_seqs=4, max_model_len=1024)
    running = serve_in_thread(factory=ENGINE_FACTORY, **engine_arguments(settings))
    for prompt in fp32_golden.prompts():
        ids = prompt.ids.tolist()
        choice = complete(running, ids, max_tokens=65)
        assert choice["token_ids"] == prompt.decode_tokens.tolist()
        logprobs = choice["logprobs"]
        assert logprobs["token_ids"] == ids + choice["token_ids"]
        assert logprobs["top_logprobs"][0] is None
        table = [[top[f"token_id:{byte}"] for byte in range(256)] for top in logprobs["top_logprobs"][1:]]
        wanted = torch.log_softmax(prompt.fed_logits, -1)
        torch.testing.assert_close(torch.tensor(table), wanted, atol=2 * fp32_golden.logits_atol, rtol=0)
        own = [top[key] for top, key in zip(logprobs["top_logprobs"][1:], logprobs["tokens"][1:], strict=True)]
        assert logprobs["token_logprobs"] == [None, *own]

        offsets = torch.arange(len(ids) + 64)
        for stage, (mask, p) in enumerate(zip(prompt.fed_boundaries, prompt.fed_probabilities, strict=True), start=1):
            offsets = offsets[mask]
            chunks = [chunk for chunk in choice["chunks"] if chunk["stage"] == stage]
            assert [chunk["start"] for chunk in chunks] == offsets.tolist()
            shown = torch.tensor([chunk["p"] for chunk in chunks])
            torch.testing.assert_close(shown, p[mask].float(), atol=fp32_golden.probability_atol, rtol=0)
        order = [(chunk["start"], chunk["stage"]) for chunk in choice["chunks"]]
        assert order == sorted(order)
