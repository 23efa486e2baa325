"""What we compare ourselves with computes the same model: else its time would mean nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.chunked_scan import ChunkedScan, scan
from benchmarks.models import Rows, Variant, build, override, text
from benchmarks.plain_step import PlainStep


@pytest.mark.parametrize("bytes_per_chunk", [None, 3.0])
@pytest.mark.parametrize("length", [1, 40, 65])
def test_chunked_scan_gives_the_runtimes_logits(tiny, bytes_per_chunk, length):
    config, weights = tiny
    prompt = text(length)
    rows = Rows(build(config, weights, Variant(kernels="torch", bytes_per_chunk=bytes_per_chunk)), 1, length)
    _, result = rows.run([prompt])
    found = ChunkedScan(config, weights, override(config, bytes_per_chunk), scan_chunk=16).prefill(prompt)
    torch.testing.assert_close(found, result.logits[-1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_scan_is_the_recurrence(chunk):
    random = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(shape, generator=random) for shape in ((20, 2, 3), (20, 4), (20, 4)))
    log_decay = -torch.rand(20, 2, generator=random)
    state, expected = torch.zeros(2, 3, 4), []
    for t in range(20):
        state = torch.exp(log_decay[t])[:, None, None] * state + x[t][:, :, None] * b[t]
        expected.append(state @ c[t])
    torch.testing.assert_close(scan(x, log_decay, b, c, chunk), torch.stack(expected))


def test_plain_step_gives_the_runtimes_logits_at_every_byte(tiny):
    config, weights = tiny
    data = text(40)
    rows = Rows(build(config, weights, Variant(kernels="torch")), 1, len(data))
    _, result = rows.run([data], logits=len(data))
    step = PlainStep(config, weights, len(data))
    found = torch.stack([step.step(byte) for byte in data])
    torch.testing.assert_close(found, result.logits, rtol=0, atol=2e-4)
