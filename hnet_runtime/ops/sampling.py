"""From logits to the next byte of each row: the draw as one function of tensors, for inside a step."""

from __future__ import annotations

import torch
from torch import Tensor

NOT_FINITE = -1  # the byte of a row whose logits are not all finite


def sample_step(
    logits: Tensor, allowed: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, top_k: Tensor
) -> Tensor:
    """The next byte of each row, what `engine.sampler.Sampler` draws for the same numbers.

    Temperature 0 takes the largest allowed logit, ties to the lowest byte. Otherwise top-k, then top-p of what it
    leaves, then min-p (relative to the most probable byte) cut the distribution at the given temperature, and
    the inverse of its cumulative sum in byte order is taken at `uniform`. Sums are in fp64.

    logits: [B, V] fp32, allowed: [B, V] bool, at least one byte a row, temperature, top_p, min_p, uniform: [B] fp64,
    top_k: [B] int64, 0 for all → [B] int64; −1 where a row's logits are not all finite.
    """
    vocabulary = logits.shape[-1]
    byte = torch.arange(vocabulary, device=logits.device)
    sound = torch.isfinite(logits).all(-1)
    masked = torch.where(allowed, logits, float("-inf"))
    greedy = masked.argmax(-1)  # the first of equals
    is_greedy = temperature == 0.0
    wide = masked.double()
    # The largest is taken off first: divided by a temperature near 0 it would be infinite.
    weights = torch.exp((wide - wide.amax(-1, keepdim=True)) / torch.where(is_greedy, 1.0, temperature)[:, None])

    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    most = torch.where(top_k == 0, vocabulary, top_k)[:, None]
    kept = torch.where(byte < most, ordered, 0.0)
    before = kept.cumsum(-1) - kept
    # At 1.0 nothing is cut, whatever the rounding of the sums.
    inside = (before < top_p[:, None] * kept.sum(-1, keepdim=True)) | (top_p >= 1.0)[:, None]
    above = ordered >= min_p[:, None] * ordered[:, :1]
    weights = torch.zeros_like(weights).scatter_(-1, order, torch.where(inside & above, kept, 0.0))

    cumulative = weights.cumsum(-1)
    target = cumulative[:, -1:] * uniform[:, None]
    # The first byte whose cumulative weight exceeds the target; rounding must not carry it past the last.
    passed = (cumulative <= target).sum(-1)
    last = torch.where(weights > 0.0, byte, 0).amax(-1)
    drawn = torch.where(is_greedy, greedy, torch.minimum(passed, last))
    return torch.where(sound, drawn, NOT_FINITE)
