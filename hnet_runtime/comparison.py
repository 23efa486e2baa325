"""Two readings of one text, compared as far as they can be compared.

Knows logits and boundaries; not what computed them.

A boundary is decided by a threshold. Where two arithmetics round a p near one half to different sides, everything
after it differs, in right code too, and comparing on would compare nothing. So a text is compared up to the first
boundary that only one of two readings has, and the rest is read anew, as a text of its own. That a disagreement is a
rounding's work and no defect, the p's themselves must show: they are compared at every position, those included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_MOST_STRETCHES = 32  # two readings that disagree so often are no match, and the rest of the text is left


@dataclass(frozen=True)
class Trace:
    """What a model made of T bytes.

    logits: [T, 256] float32. `p[s]`: what the router of routed stage s said, by the byte offset of each of its
    positions, in order; `boundaries[s]`: the offsets among them that opened a chunk.
    """

    logits: Tensor
    p: tuple[Mapping[int, float], ...]
    boundaries: tuple[frozenset[int], ...]


Reading = Callable[[bytes], Trace]


@dataclass(frozen=True)
class Difference:
    """How far apart two readings of one text are.

    compared: positions whose logits were compared. max_abs, rms: of the logits' difference. same_argmax: share of
    positions with the same most probable byte. p_max_abs, p_rms: of the difference of the routers' p. flips: boundaries
    only one of the two has, of how many positions, for each routed stage. bits_per_byte: of the text under each of the
    two, NaN where no next byte was compared. bitwise: every logit, p and boundary of the whole text is the same.
    """

    compared: int
    max_abs: float
    rms: float
    same_argmax: float
    p_max_abs: float
    p_rms: float
    flips: tuple[int, ...]
    positions: tuple[int, ...]
    bits_per_byte: tuple[float, float]
    bitwise: bool


@dataclass(frozen=True)
class Tolerance:
    """What is demanded of a Difference: the most it may be, in its fields' terms; None demands nothing.

    same_argmax is the least share; bits_per_byte is the most the two may differ by; flips is a share of the positions
    of all routers together; `bitwise` asks for the same bits and nothing else.
    """

    max_abs: float | None = None
    rms: float | None = None
    same_argmax: float | None = None
    p_max_abs: float | None = None
    p_rms: float | None = None
    bits_per_byte: float | None = None
    flips: float | None = None
    bitwise: bool = False

    def allows(self, found: Difference) -> bool:
        """NaN is never allowed."""
        if self.bitwise:
            return found.bitwise
        most = (
            (found.max_abs, self.max_abs),
            (found.rms, self.rms),
            (found.p_max_abs, self.p_max_abs),
            (found.p_rms, self.p_rms),
            (sum(found.flips) / max(sum(found.positions), 1), self.flips),
            (abs(found.bits_per_byte[0] - found.bits_per_byte[1]), self.bits_per_byte),
        )
        close = all(figure <= limit for figure, limit in most if limit is not None)
        return close and (self.same_argmax is None or found.same_argmax >= self.same_argmax)

    def __str__(self) -> str:
        if self.bitwise:
            return "the same bits"
        says = {
            "max_abs": "logits within {:.2g}",
            "rms": "rms of logits within {:.2g}",
            "same_argmax": "same best byte at {:.0%} at least",
            "p_max_abs": "p within {:.2g}",
            "p_rms": "rms of p within {:.2g}",
            "bits_per_byte": "bits per byte within {:.2g}",
            "flips": "at most {:.0%} of boundaries flipped" if self.flips else "no boundary flipped",
        }
        asked = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name in says)
        return ", ".join(says[name].format(limit) for name, limit in asked if limit is not None)


@dataclass(frozen=True)
class Check:
    """One comparison, what was demanded of it, and whether that held."""

    name: str
    demand: str
    passed: bool
    difference: Difference


def check(name: str, expected: Reading, found: Reading, data: bytes, tolerance: Tolerance) -> Check:
    """Compares two readings of `data` and judges what is between them."""
    apart = compare(expected, found, data)
    return Check(name, str(tolerance), tolerance.allows(apart), apart)


def compare(expected: Reading, found: Reading, data: bytes) -> Difference:
    """How far apart two readings of `data` (BOS first) are; figures are NaN where either has NaN."""
    gaps: list[Tensor] = []
    same: list[Tensor] = []
    bits: list[tuple[Tensor, Tensor]] = []
    p_gaps: list[float] = []
    bitwise, begin = True, 1
    for stretch in range(_MOST_STRETCHES):
        piece = data[:1] + data[begin:]
        one, other = expected(piece), found(piece)
        bitwise = bitwise and is_bitwise_equal(one, other)
        if not stretch:
            flips, positions = [0] * len(one.p), [0] * len(one.p)
        end, flipped = _first_flip(one, other) or (len(piece), None)
        gaps.append(other.logits[:end] - one.logits[:end])
        same.append(one.logits[:end].argmax(-1) == other.logits[:end].argmax(-1))
        bits.append((_bits(one.logits[:end], piece), _bits(other.logits[:end], piece)))
        for stage, (p, other_p) in enumerate(zip(one.p, other.p, strict=True)):
            both = [at for at in p if at < end or (at == end and flipped is not None and stage <= flipped)]
            p_gaps += [abs(p[at] - other_p[at]) for at in both]
            positions[stage] += len(both)
        if flipped is None:
            break
        flips[flipped] += 1
        begin += max(end, 1)  # the byte they disagree about is left out
        if begin >= len(data):
            break
    gap, p_gap = torch.cat(gaps), torch.tensor(p_gaps or [0.0])
    first, second = (torch.cat(each).mean() for each in zip(*bits, strict=True))
    return Difference(
        compared=len(gap),
        max_abs=float(gap.abs().max()) if len(gap) else math.nan,
        rms=float(gap.square().mean().sqrt()),
        same_argmax=float(torch.cat(same).float().mean()),
        p_max_abs=float(p_gap.max()),
        p_rms=float(p_gap.square().mean().sqrt()),
        flips=tuple(flips),
        positions=tuple(positions),
        bits_per_byte=(float(first), float(second)),
        bitwise=bitwise,
    )


def is_bitwise_equal(one: Trace, other: Trace) -> bool:
    """Whether every number of two traces is the same; NaN equals nothing."""
    return torch.equal(one.logits, other.logits) and one.p == other.p and one.boundaries == other.boundaries


def _first_flip(one: Trace, other: Trace) -> tuple[int, int] | None:
    """Byte offset and stage of the first boundary, outermost stage first, that only one of two traces has."""
    pairs = enumerate(zip(one.boundaries, other.boundaries, strict=True))
    return min(((min(a ^ b), stage) for stage, (a, b) in pairs if a ^ b), default=None)


def _bits(logits: Tensor, data: bytes) -> Tensor:
    """logits: [T, 256] of the first T positions of `data` → bits of each byte that follows one, [T or T − 1]."""
    following = torch.tensor(list(data[1 : len(logits) + 1]), dtype=torch.int64)
    chances = torch.log_softmax(logits[: len(following)].double(), -1)
    return -chances.gather(1, following.unsqueeze(1)).squeeze(1) / math.log(2)
