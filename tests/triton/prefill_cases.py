"""Prefill kernels against their twins, in a process where TRITON_INTERPRET is set: see test_prefill_kernels.py.

Run as a script it prints a line for each case that fails and exits with their number. A program instance takes about
6 ms in the interpreter, so shapes are small and odd rather than many. The interpreter truncates where it
stores fp32 as bf16: results that are rounded so may differ from the twin's by one unit in the last place
(closeness.py).
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import library_stand_ins
import numpy as np
import torch
import triton.language as tl
from closeness import FP32 as SUMS
from closeness import close
from closeness import noise as normal
from library_stand_ins import causal_conv1d_fn, flash_attn_varlen_func
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.config import BOS
from hnet_runtime.gpu_doctor.kernel_group import PREFILL, ROUNDED
from hnet_runtime.gpu_doctor.prefill_cases import SMALL, prefill_cases
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.results import Result
from hnet_runtime.ops import attention, conv, ema, rotary, ssm
from hnet_runtime.ops.attention import KeyGrid
from hnet_runtime.ops.prefill import PrefillOps
from hnet_runtime.ops.spans import Spans
from hnet_runtime.ops.triton import adapters, conv_spans, prefill_attention, scan, smooth
from hnet_runtime.ops.triton.libraries import choose
from hnet_runtime.ops.triton.packed_spans import TILE
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
ROWS = 6

# What spans there are: (rows, starts, lengths).
SPANS = {
    "one long": ([3], [0], [150]),
    "ragged": ([2, 5, 1], [0, 0, 0], [9, 70, 33]),
    "starts within tiles": ([4, 1, 2], [37, 64, 100], [60, 64, 3]),
    "at tile borders": ([1, 2, 3], [63, 64, 128], [1, 65, 64]),
    "lengths of 1": ([5, 1, 4], [0, 130, 63], [1, 1, 1]),
}


def spans_of(name: str) -> Spans:
    return Spans.of(*SPANS[name], CPU)[0]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return normal(*shape, seed=seed).to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    """Of the largest number: sums of as many terms cancel; a bf16 model's fp32 operands are split in two."""
    return 5 * SUMS if dtype == FP32 else 10 * SUMS


def same(found: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(found, expected), f"{what}: differs by up to {(found - expected).abs().max()}"


# ── the recurrence ─────────────────────────────────────────────────────────────────────────────────


def scan_inputs(spans: Spans, heads: int, channels: int, states: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs as a mixer has them: x, B and C are views of one tensor."""
    wide = noise(spans.total, heads * channels + 2 * states, seed=1, dtype=dtype)
    x, b, c = torch.split(wide, [heads * channels, states, states], dim=-1)
    return {
        "x": x.view(spans.total, heads, channels),
        "dt": torch.nn.functional.softplus(noise(spans.total, heads, seed=2) * 2),
        "a": -torch.exp(noise(heads, seed=3) * 1.5),
        "b": b,
        "c": c,
        "d": noise(heads, seed=4),
    }


def run_scan(spans: Spans, inputs: dict[str, Tensor], state: Tensor, **options: object) -> Tensor:
    return scan.selective_scan(**inputs, state=state, spans=spans, **options)  # type: ignore[arg-type]


def scan_case(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    spans = spans_of(name)
    inputs = scan_inputs(spans, *shape, dtype)
    before = noise(ROWS, *shape, seed=5)
    expected_state, found_state = before.clone(), before.clone()
    wide = {key: value.float().contiguous() for key, value in inputs.items()}
    expected = ssm.selective_scan(**wide, state=expected_state, spans=spans)
    found = run_scan(spans, inputs, found_state)
    close(found, expected, tolerance(dtype))
    close(found_state, expected_state, tolerance(dtype))
    untouched = [row for row in range(ROWS) if row not in spans.rows]
    same(found_state[untouched], before[untouched], "other rows' states")
    if dtype == BF16:
        close(run_scan(spans, inputs, before.clone(), out_dtype=BF16), expected.to(BF16), tolerance(dtype))


def scan_strong_decay() -> None:
    """A state that decays by e^−600 at one position forgets nothing of what comes after."""
    spans = spans_of("ragged")
    inputs = scan_inputs(spans, 1, 16, 16, FP32)
    inputs["dt"] = torch.where(torch.arange(spans.total)[:, None] % 7 == 0, 600.0, 1e-3)
    inputs["a"] = torch.tensor([-1.0])
    inputs["x"] = inputs["x"] / inputs["dt"][..., None]
    inputs["d"] = torch.zeros(1)
    expected_state, found_state = (noise(ROWS, 1, 16, 16, seed=5) for _ in range(2))
    wide = {key: value.float().contiguous() for key, value in inputs.items()}
    expected = ssm.selective_scan(**wide, state=expected_state, spans=spans)
    close(run_scan(spans, inputs, found_state), expected, tolerance(FP32))
    close(found_state, expected_state, tolerance(FP32))


def scan_cuts() -> None:
    """Cut at multiples of a tile and in any company, a row's numbers are the same bit for bit."""
    shape, length = (2, 16, 16), 150
    one = Spans.of([3], [20], [length], CPU)[0]
    inputs = scan_inputs(one, *shape, FP32)
    state = noise(ROWS, *shape, seed=5)
    whole_state = state.clone()
    whole = run_scan(one, inputs, whole_state)
    pieces = []
    for begin, end in ((0, TILE - 20), (TILE - 20, 2 * TILE - 20), (2 * TILE - 20, length)):
        # Beside the row's piece another of its inputs reversed.
        spans = Spans.of([3, 1], [20 + begin, 0], [end - begin, 10], CPU)[0]
        place = torch.from_numpy(spans.offsets[: end - begin] + int(np.flatnonzero(spans.rows == 3)[0]))
        mixed = {}
        for key, value in inputs.items():
            if value.shape[0] != length:
                mixed[key] = value
                continue
            packed = noise(spans.total, *value.shape[1:], seed=8).abs()
            packed[place] = value[begin:end]
            mixed[key] = packed
        pieces.append(run_scan(spans, mixed, state)[place])
    same(torch.cat(pieces), whole, "y")
    same(state[3], whole_state[3], "state")


def scan_turns() -> None:
    """More tiles than the scratch holds at once run in turns, with the same bits."""
    spans, shape = spans_of("ragged"), (1, 16, 16)
    inputs = scan_inputs(spans, *shape, FP32)
    states = [noise(ROWS, *shape, seed=5) for _ in range(2)]
    at_once = run_scan(spans, inputs, states[0])
    before, scan.SCRATCH_BYTES = scan.SCRATCH_BYTES, 4 * math.prod(shape) * 2
    try:
        same(run_scan(spans, inputs, states[1]), at_once, "y")
    finally:
        scan.SCRATCH_BYTES = before
    same(states[1], states[0], "states")


# ── the convolution ────────────────────────────────────────────────────────────────────────────────


def conv_case(name: str, channels: int, taps: int, dtype: torch.dtype) -> None:
    spans = spans_of(name)
    x = noise(spans.total, channels + 8, seed=1, dtype=dtype)[:, 3 : 3 + channels]
    before = noise(ROWS, taps - 1, channels, seed=2, dtype=dtype)
    weight, bias = noise(taps, channels, seed=3), noise(channels, seed=4)
    expected_state, found_state, rounded_state = before.clone(), before.clone(), before.clone()
    expected = conv.causal_conv(x, expected_state, spans, weight, bias)
    close(conv_spans.causal_conv(x, found_state, spans, weight, bias), expected)
    same(found_state, expected_state, "states")
    if dtype == BF16:
        rounded = conv_spans.causal_conv(x, rounded_state, spans, weight, bias, out_dtype=dtype)
        close(rounded, expected.to(dtype))


# ── smoothing ──────────────────────────────────────────────────────────────────────────────────────


def smooth_case(name: str, width: int, dtype: torch.dtype) -> None:
    spans = spans_of(name)
    z = noise(spans.total, width + 5, seed=1, dtype=dtype)
    p = torch.rand(spans.total, generator=torch.Generator().manual_seed(2))
    p[::3], p[1::5] = 1.0, 0.0
    before = noise(ROWS, width, seed=3)
    expected_memory, found_memory = before.clone(), before.clone()
    expected = ema.smooth(z[:, :width], p, expected_memory, spans)
    same(smooth.smooth(z, p, found_memory, spans), expected, "out")
    same(found_memory, expected_memory, "memory")


# ── rotary and attention ───────────────────────────────────────────────────────────────────────────


def rotate_case(heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    total = 12
    qkv = noise(total, 3, heads, head_dim, seed=1, dtype=dtype)
    table = rotary.rotary_table(torch.arange(total) * 97, rotary_dim)
    expected = rotary.rotate(qkv[:, 1], table)
    found = prefill_attention.rotate(qkv[:, 1], table)
    if dtype == FP32:
        same(found, expected, "rotated")
    else:
        close(found, expected)


class Store:
    """Keys and values of ROWS rows in pages or in a ring, with what other rows left in them."""

    def __init__(self, window: int, paged: bool, heads: int, head_dim: int, dtype: torch.dtype, fill: float) -> None:
        self.window, self.capacity, self.table = window, None, None
        self.slots: PagePool | RingSlots
        if paged:
            pool = PagePool(ROWS, 4 * ROWS, 4 * PAGE)
            for row in (3, 1, 4, 2, 5):
                pool.reserve(row, 4 * PAGE)
            self.slots, self.table = pool, torch.from_numpy(pool.table)
            count = (pool.num_pages + 1) * PAGE
        else:
            self.slots = RingSlots(window + 1)
            self.capacity = window + 1
            count = ROWS * (window + 1)
        self.k, self.v = (torch.full((count, heads, head_dim), fill, dtype=dtype) for _ in range(2))

    def twin(self, spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attend(q, k, v, self.k, self.v, KeyGrid(spans, self.window, self.slots.slots, self.capacity))

    def ours(self, spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = prefill_attention.Keys(spans, self.window, self.table, self.capacity)
        return prefill_attention.attend(q, k, v, self.k, self.v, keys)


def attend_case(
    ticks: list[tuple[list[int], list[int]]], window: int, paged: bool, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Spans tick after tick over the same stores, each going on where its row stopped."""
    expected_store, found_store = (Store(window, paged, heads, head_dim, dtype, math.nan) for _ in range(2))
    position = dict.fromkeys(range(ROWS), 0)
    for number, (rows, lengths) in enumerate(ticks):
        spans = Spans.of(rows, [position[row] for row in rows], lengths, CPU)[0]
        for row, length in zip(rows, lengths, strict=True):
            position[row] += length
        qkv = noise(spans.total, 3, heads, head_dim, seed=number, dtype=dtype)
        q, k, v = qkv[:, 0] * 2, qkv[:, 1], qkv[:, 2]
        expected = expected_store.twin(spans, q, k, v)
        close(found_store.ours(spans, q, k, v), expected, tolerance(dtype))
        for name in ("k", "v"):
            expected_kept, found_kept = getattr(expected_store, name), getattr(found_store, name)
            assert torch.equal(found_kept.nan_to_num(9.0), expected_kept.nan_to_num(9.0)), f"tick {number}: kept {name}"


def attend_cuts(window: int, paged: bool) -> None:
    """However a row is cut and whatever runs beside it, each query's numbers are the same bit for bit."""
    length = 140
    qkv = noise(length, 3, 1, 16, seed=7)

    def run(sizes: list[int], company: bool) -> Tensor:
        store, outs, begin = Store(window, paged, 1, 16, FP32, math.nan), [], 0
        for size in sizes:
            rows, starts, lengths = ([3, 1], [begin, begin], [size, size]) if company else ([3], [begin], [size])
            spans = Spans.of(rows, starts, lengths, CPU)[0]
            mine = torch.from_numpy(spans.offsets[:size] + int(np.flatnonzero(spans.rows == 3)[0]))
            packed = noise(spans.total, 3, 1, 16, seed=begin)
            packed[mine] = qkv[begin : begin + size]
            outs.append(store.ours(spans, *packed.unbind(1))[mine])
            begin += size
        return torch.cat(outs)

    whole = run([length], company=False)
    same(run([1, 63, 30, 46], company=True), whole, "out")


# ── a whole model ──────────────────────────────────────────────────────────────────────────────────


def to_nearest(
    convert: Callable[..., NDArray[Any]], data: NDArray[Any], source: Any, target: Any, mode: Any
) -> NDArray[Any]:
    """The interpreter's conversion of floating point numbers, but from fp32 to bf16 rounding as a device rounds: what
    is cut off in every layer adds up."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(data, source, target, mode)
    rounded = torch.from_numpy(np.array(data)).view(FP32).to(BF16)
    return rounded.view(torch.uint16).numpy()


def model_case(name: str, dtype: torch.dtype, libraries: bool = False) -> None:
    """Prompts of two rows, piece by piece, through a golden model on the twins and on what a GPU would run."""
    source = locate(Path(__file__).parents[1] / "golden" / name)
    model = HNet(source.config, load_weights(source, dtype=dtype, device=CPU))
    text = bytes([BOS]) + b"It was late when the ferry came in; nobody answered. " * 4
    ticks = [([1, 2], [text[:70], text[:9]]), ([2, 1], [text[9:40], text[70:75]]), ([1], [text[75:150]])]

    def run() -> list[Result]:
        state = model.new_state(num_rows=2, kv_positions=512, max_positions=256)
        for pool, row in itertools.product(state.page_pools, (2, 1)):
            pool.reserve(row, 256)
        return [model.run(state, rows, pieces, [len(piece) for piece in pieces]) for rows, pieces in ticks]

    expected = run()
    with mock.patch.dict(sys.modules, causal_conv1d=library_stand_ins, flash_attn=library_stand_ins):
        model.prefill = adapters.prefill_ops(choose(torch.device("cuda"), libraries=libraries))
    assert (set(model.prefill.forms.values()) == {"triton"}) != libraries
    with mock.patch.object(interpreter, "_convert_float", partial(to_nearest, interpreter._convert_float)):
        found = run()
    rounding = 0.0 if dtype == FP32 else 0.03  # a bf16 ulp a layer, on its way through all of them
    for ours, theirs in zip(found, expected, strict=True):
        close(ours.logits, theirs.logits, rounding + tolerance(dtype))
        assert len(ours.verdicts) == len(theirs.verdicts) == source.config.num_routed_stages
        for verdicts, true in zip(ours.verdicts, theirs.verdicts, strict=True):
            assert np.array_equal(verdicts.boundary, true.boundary), "boundaries"


# ── other projects' kernels, by stand-ins ──────────────────────────────────────────────────────────

CONVOLVED = {"one of 1": ([3], [7], [1]), "one": ([3], [0], [37]), "equal": ([4, 1, 2], [0, 9, 100], [20, 20, 20])}


def conv_library_case(name: str, channels: int, dtype: torch.dtype, taken: bool) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return causal_conv1d_fn(*arguments, **named)

    spans = Spans.of(*(CONVOLVED | SPANS)[name], CPU)[0]
    x = noise(spans.total, channels + 16, seed=1, dtype=dtype)[:, 8 : 8 + channels]
    before = noise(ROWS, 3, channels, seed=2, dtype=dtype)
    weight, bias = noise(4, channels, seed=3), noise(channels, seed=4)
    expected_state, found_state = before.clone(), before.clone()
    expected = conv.causal_conv(x, expected_state, spans, weight, bias)
    found = adapters.conv_with(counted)(x, found_state, spans, weight, bias, out_dtype=dtype)
    close(found, expected.to(dtype))
    same(found_state, expected_state, "states")
    assert bool(calls) == taken, "the library's kernel" + (" was not called" if taken else " was called")


def attend_library_case(rows: list[int], lengths: list[int], window: int, paged: bool) -> None:
    """Spans that begin at 0 go to the library, those that go on from kept keys to ours."""
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return flash_attn_varlen_func(*arguments, **named)

    attend = adapters.attend_with(counted)
    expected_store, found_store = (Store(window, paged, 2, 16, BF16, math.nan) for _ in range(2))
    starts = [0] * len(rows)
    for taken in (True, False):
        spans = Spans.of(rows, starts, lengths, CPU)[0]
        q, k, v = noise(spans.total, 3, 2, 16, seed=len(calls), dtype=BF16).unbind(1)
        expected = expected_store.twin(spans, q, k, v)
        keys = prefill_attention.Keys(spans, window, found_store.table, found_store.capacity)
        found = attend(q, k, v, found_store.k, found_store.v, keys)
        close(found, expected, tolerance(BF16))
        for name in ("k", "v"):
            same(getattr(found_store, name).nan_to_num(9.0), getattr(expected_store, name).nan_to_num(9.0), name)
        assert len(calls) == 1, "called once, for spans that begin at 0" if taken else "called for spans that go on"
        starts = lengths


ATTENTION = {
    "pages, all": (-1, True),
    "pages, window": (70, True),
    "ring of 1": (0, False),
    "ring of 6": (5, False),
    "ring of 64": (63, False),
    "ring of 101": (100, False),
}
TICKS = [([2, 5], [70, 20]), ([5, 2, 1], [1, 1, 3]), ([2, 5, 1], [30, 75, 2])]


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, dtype in itertools.product(SPANS, (FP32, BF16)):
        shape = (2, 16, 16) if dtype == FP32 else (1, 20, 33)
        yield f"scan {name} {dtype}", lambda n=name, s=shape, d=dtype: scan_case(n, s, d)
        yield f"conv {name} {dtype}", lambda n=name, d=dtype: conv_case(n, 130 if d == FP32 else 40, 4, d)
        yield f"smooth {name} {dtype}", lambda n=name, d=dtype: smooth_case(n, 130 if d == FP32 else 40, d)
    yield "scan official head", lambda: scan_case("ragged", (1, 64, 128), BF16)
    yield "scan strong decay", scan_strong_decay
    yield "scan cuts", scan_cuts
    yield "scan turns", scan_turns
    yield "conv of 2 taps", lambda: conv_case("ragged", 17, 2, FP32)
    yield "conv of 3 taps", lambda: conv_case("lengths of 1", 17, 3, FP32)
    for heads, head_dim, rotary_dim in ((2, 16, 16), (3, 24, 12), (1, 96, 48)):
        for dtype in (FP32, BF16):
            yield (
                f"rotate {heads}·{head_dim}/{rotary_dim} {dtype}",
                lambda h=heads, p=head_dim, r=rotary_dim, d=dtype: rotate_case(h, p, r, d),
            )
    for (name, (window, paged)), dtype in itertools.product(ATTENTION.items(), (FP32, BF16)):
        yield (
            f"attend {name} {dtype}",
            lambda w=window, g=paged, d=dtype: attend_case(
                TICKS, w, g, 2 if d == FP32 else 1, 16 if d == FP32 else 24, d
            ),
        )
    yield "attend official head", lambda: attend_case(TICKS[:2], -1, True, 1, 96, BF16)
    for name in ("pages, all", "pages, window", "ring of 6", "ring of 64", "ring of 101"):
        yield f"attend cuts {name}", lambda s=ATTENTION[name]: attend_cuts(*s)

    for name, dtype in (("a_1stage", FP32), ("b_2stage", FP32), ("e_iso_T2", FP32), ("g_2stage_bf16", BF16)):
        yield f"model {name}", lambda n=name, d=dtype: model_case(n, d)
    yield "model with libraries", lambda: model_case("g_2stage_bf16", BF16, libraries=True)
    for name in CONVOLVED:
        for dtype in (FP32, BF16):
            yield f"conv by library {name} {dtype}", lambda n=name, d=dtype: conv_library_case(n, 24, d, taken=True)
    yield "conv by library ragged", lambda: conv_library_case("ragged", 24, BF16, taken=False)
    yield "conv by library odd channels", lambda: conv_library_case("one", 20, BF16, taken=False)
    for name in ("pages, all", "ring of 6"):
        yield f"attend by library {name}", lambda s=ATTENTION[name]: attend_library_case([2, 5, 1], [9, 70, 33], *s)
        yield f"attend by library one, {name}", lambda s=ATTENTION[name]: attend_library_case([3], [66], *s)

    ops = adapters.prefill_ops(choose(torch.device("cuda"), libraries=False))
    for case in prefill_cases(SMALL):  # what `hnet doctor --gpu` looks at, in small
        most = ROUNDED if "bfloat16" in case.name else PREFILL
        yield (
            f"on a GPU {case.op} {case.name}",
            lambda c=case, m=most: c.compare(ops, PrefillOps.torch(), CPU, m),
        )


def main() -> int:
    wanted = sys.argv[1:]
    failed = 0
    for name, case in cases():
        if wanted and not all(word in name for word in wanted):
            continue
        started = time.perf_counter()
        try:
            case()
        except Exception:  # noqa: BLE001 a case that fails in any way is told, and the others run
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}")
        else:
            print(f"passed {name} {time.perf_counter() - started:.2f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
