"""Inputs on which each kernel is compared with its twin, on any device: ours for tests and a user's GPU alike.

Knows shapes and signatures; not which code runs an op. Padding rows are row 0, and what they give is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hnet_runtime.gpu_doctor.closeness import close, noise
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots

FP32, BF16 = torch.float32, torch.bfloat16
ROWS = ((3,), (8, 2, 7), (5, 1, 0, 0, 0))
"""A row alone; rows out of order; and a bucket padded with row 0."""
NUM_ROWS = 9


@dataclass(frozen=True)
class Call:
    """Arguments of an op. written: the places among them of memory that it updates, each with how much of that, from
    its beginning, is padding's; real: the rows of the result that are compared, None for all."""

    arguments: tuple[Any, ...]
    written: dict[int, int] = field(default_factory=dict)
    real: list[int] | None = None


@dataclass(frozen=True)
class StepCase:
    """`prepare` gives new arguments, always the same numbers."""

    op: str
    name: str
    prepare: Callable[[torch.device], Call]

    def compare(self, kernel: Callable[..., Any], twin: Callable[..., Any], device: torch.device, most: float) -> float:
        """Runs both on memory of their own. Gives the largest difference; AssertionError where it is too large."""
        ours, theirs = self.prepare(device), self.prepare(device)
        found, expected = _outputs(kernel(*ours.arguments)), _outputs(twin(*theirs.arguments))
        real = slice(None) if ours.real is None else ours.real
        apart = [close(one[real], other[real], most) for one, other in zip(found, expected, strict=True)]
        for place, padding in ours.written.items():
            one, other = ours.arguments[place], theirs.arguments[place]
            apart.append(close(one[padding:], other[padding:], most))
        return max(apart)


def _outputs(result: Any) -> Sequence[Tensor]:
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Sizes:
    """Widths that are looked at, each kernel's in turn."""

    norm: tuple[int, ...]
    conv: tuple[int, ...]
    ssm: tuple[tuple[int, int, int], ...]  # heads, head dim, states
    router: tuple[int, ...]
    attention: tuple[tuple[int, int, int], ...]  # heads, head dim, rotary channels
    length: int
    buckets: tuple[int, ...]


SMALL = Sizes((100,), (20,), ((2, 24, 16),), (100,), ((2, 16, 8),), 130, (1, 7))
OFFICIAL = Sizes(
    (1024, 1536),
    (2304, 3328),
    ((32, 64, 128), (3, 64, 100)),
    (1024, 1000),
    ((16, 64, 32), (3, 96, 0)),
    600,
    (1, 7, 64, 300),
)


def step_cases(sizes: Sizes) -> Iterator[StepCase]:
    """Of every op of a step."""
    for dtype in (FP32, BF16):
        short = str(dtype).removeprefix("torch.")
        for width in sizes.norm:
            for begins in (False, True):
                name = f"{width} {short}, {'at' if begins else 'after'} the beginning"
                yield StepCase("add_rms_norm", name, partial(_add_rms_norm, dtype, width, begins))
            yield StepCase("gated_norm_step", f"{width} {short}", partial(_gated_norm, dtype, width))
            yield StepCase("swiglu", f"{width} {short}", partial(_swiglu, dtype, width))
        for rows in ROWS:
            beside = f"{short}, rows {','.join(map(str, rows))}"
            for width, taps in product(sizes.conv, (2, 4)):
                yield StepCase("conv_step", f"{width}·{taps} {beside}", partial(_conv, dtype, rows, width, taps))
            for shape in sizes.ssm:
                yield StepCase("ssm_step", f"{'·'.join(map(str, shape))} {beside}", partial(_ssm, dtype, rows, *shape))
            for width in sizes.router:
                yield StepCase("router_step", f"{width} {beside}", partial(_router, dtype, rows, width))
                yield StepCase("ema_step", f"{width} {beside}", partial(_ema, dtype, rows, width))
                yield StepCase("ema_kept", f"{width} {beside}", partial(_ema_kept, dtype, rows, width))
        for heads, head_dim, turned in sizes.attention:
            shape_name = f"{heads}·{head_dim} {short}"
            rotate = partial(_rotate, dtype, heads, head_dim, turned)
            yield StepCase("rotate_and_keep", f"{shape_name}, {turned} turned", rotate)
            for window, paged in ((-1, True), (70, True), (100, False), (0, False)):
                name = f"{shape_name}, {'pages' if paged else 'ring'}, window {window}"
                decode = partial(_decode, dtype, heads, head_dim, window, paged, sizes.length)
                yield StepCase("decode_attention", name, decode)
        yield StepCase("enter_step", short, partial(_enter, dtype))
        yield StepCase("resume_step", short, partial(_resume, dtype))
        yield StepCase("surface_step", short, partial(_surface, dtype))
        for bucket, share in product(sizes.buckets, (0.0, 0.3, 1.0)):
            name = f"{bucket} rows, {share:.0%} open, {short}"
            yield StepCase("descend_step", name, partial(_descend, dtype, bucket, share))
            yield StepCase("park_step", name, partial(_park, dtype, bucket, share))
    for op, paged in product(("next_places", "last_places"), (False, True)):
        yield StepCase(op, "pages" if paged else "ring", partial(_places, paged))
    for seed, dtype in product(range(4), (FP32, BF16)):
        yield StepCase("draw_step", f"draw {seed}, {dtype}".replace("torch.", ""), partial(_draw, seed, dtype))


def _add_rms_norm(dtype: torch.dtype, width: int, begins: bool, device: torch.device) -> Call:
    h, residual, weight = _on(device, noise(3, width).to(dtype), noise(3, width, seed=1), noise(width, seed=2))
    return Call((h, residual, weight, begins), {1: 0})


def _gated_norm(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    gate, y = _on(device, (noise(3, 2 * width + 9) * 20).to(dtype), noise(3, width, seed=1).to(dtype))
    return Call((y, gate[:, 5 : 5 + width], *_on(device, noise(width, seed=2))))


def _swiglu(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    (y,) = _on(device, (noise(3, 2 * width + 30) * 5).to(dtype))
    return Call((y[:, 4 : 4 + 2 * width],))


def _conv(dtype: torch.dtype, rows: tuple[int, ...], width: int, taps: int, device: torch.device) -> Call:
    x, state = noise(len(rows), width + 50, seed=10).to(dtype), noise(NUM_ROWS, taps - 1, width).to(dtype)
    x, state, at, weight, bias = _on(
        device, x, state, torch.tensor(rows), noise(taps, width, seed=1), noise(width, seed=2)
    )
    return Call((x[:, 7 : 7 + width], state, at, weight, bias), {1: 1}, _real(rows))


def _ssm(
    dtype: torch.dtype, rows: tuple[int, ...], heads: int, head_dim: int, states: int, device: torch.device
) -> Call:
    channels = heads * head_dim + 2 * states
    (projected,) = _on(device, noise(len(rows), 11 + channels + heads, seed=10).to(dtype))
    a, dt_bias, d, state, at = _on(
        device,
        *(-torch.exp(noise(heads, seed=1)), noise(heads, seed=2) * 5, noise(heads, seed=3)),
        *(noise(NUM_ROWS, heads, head_dim, states), torch.tensor(rows)),
    )
    xbc, dt = projected[:, 11 : 11 + channels], projected[:, 11 + channels :]
    return Call((xbc, dt, a, dt_bias, d, state, at), {5: 1}, _real(rows))


def _router(dtype: torch.dtype, rows: tuple[int, ...], width: int, device: torch.device) -> Call:
    h, memory, at, positions, q, k = _on(
        device,
        *(noise(len(rows), width + 8, seed=10).to(dtype), noise(NUM_ROWS, width).to(dtype), torch.tensor(rows)),
        *(torch.tensor([row % 3 for row in rows]), noise(width, width, seed=1), noise(width, width)),
    )
    return Call((h[:, 3 : 3 + width], memory, at, positions, q, k), {1: 1}, _real(rows))


def _ema(dtype: torch.dtype, rows: tuple[int, ...], width: int, device: torch.device) -> Call:
    count = len(rows)
    z = noise(count + 1, width + 4, seed=1).to(dtype)
    z[count] = float("nan")  # what a row that opened no chunk must not take up
    opened = torch.tensor([index % 2 == 0 for index in range(count)])
    place = torch.tensor([count - 1 - index if opened[index] else count for index in range(count)])
    p = torch.where(opened, torch.tensor([1.0, 0.2, 0.7, 0.50001, 0.0])[:count], float("nan"))
    kept = noise(NUM_ROWS, width), torch.tensor(rows), noise(count, width, seed=2)
    return Call(tuple(_on(device, z, place, p, opened, *kept)), {4: 1}, _real(rows))


def _ema_kept(dtype: torch.dtype, rows: tuple[int, ...], width: int, device: torch.device) -> Call:
    given = _on(device, noise(NUM_ROWS, width), torch.tensor(rows), noise(len(rows), width, seed=2))
    return Call((*given, dtype), {}, _real(rows))


def _places(paged: bool, device: torch.device) -> Call:
    rows = [7, 3, 0, 0]
    pool = PagePool(NUM_ROWS, 64, 600)
    for row in (3, 7):
        pool.reserve(row, 600)
    given = torch.tensor(rows), torch.tensor([0, 5, 5, 599, 5, 5, 5, 63, 5]), torch.from_numpy(pool.table)
    at, positions, table = _on(device, *given)
    return Call((at, positions, table if paged else None, None if paged else 70), {1: 0})


def _rotate(dtype: torch.dtype, heads: int, head_dim: int, turned: int, device: torch.device) -> Call:
    stores = (noise(40, heads, head_dim, seed=seed).to(dtype) for seed in (1, 2))
    at = torch.tensor([0, 977, 5]), torch.tensor([33, 2, 17])
    qkv, positions, slots, k, v = _on(device, noise(3, 3, heads, head_dim).to(dtype), *at, *stores)
    return Call((qkv, positions, slots, k, v, turned), {3: 0, 4: 0})


def _decode(
    dtype: torch.dtype, heads: int, head_dim: int, window: int, paged: bool, length: int, device: torch.device
) -> Call:
    rows, positions = [7, 3, 0], [length - 1, length // 2, 1]
    table = capacity = None
    if paged:
        pool = PagePool(NUM_ROWS, 4 * -(-length // PAGE), length)
        for row in (3, 7):
            pool.reserve(row, length)
        table, count = torch.from_numpy(pool.table).to(device), (pool.num_pages + 1) * PAGE
    else:
        capacity = RingSlots(window + 1).capacity
        count = NUM_ROWS * capacity
    k, v = (noise(count, heads, head_dim, seed=seed).to(dtype) for seed in (1, 2))
    q, k, v, at, when = _on(
        device, (noise(3, heads, head_dim, seed=10) * 2).to(dtype), k, v, torch.tensor(rows), torch.tensor(positions)
    )
    return Call((q, k, v, at, when, table, window, capacity, length), {}, _real(rows))


def _enter(dtype: torch.dtype, device: torch.device) -> Call:
    rows, data = torch.tensor([5, 1, 2, 7, 0, 0]), torch.tensor([65, -1, -1, 0, 0, 0])
    next_bytes = torch.tensor([-1, 200, -1, 9, 9, -1, -1, 30])
    return Call(_on(device, rows, data, next_bytes, noise(256, 300).to(dtype), noise(6)), {2: 1, 4: 0})


def _resume(dtype: torch.dtype, device: torch.device) -> Call:
    given = torch.tensor([5, 1, 0]), noise(NUM_ROWS, 300).to(dtype), noise(20).to(dtype), noise(3)
    return Call(_on(device, *given), {3: 0})


def _surface(dtype: torch.dtype, device: torch.device) -> Call:
    return Call(_on(device, torch.tensor([5, 1, 0]), noise(NUM_ROWS, 300).to(dtype), noise(NUM_ROWS)))


def _descend(dtype: torch.dtype, bucket: int, share: float, device: torch.device) -> Call:
    return Call(_on(device, *_verdicts(dtype, bucket, share), noise(20).to(dtype), noise(bucket)), {4: 0})


def _park(dtype: torch.dtype, bucket: int, share: float, device: torch.device) -> Call:
    parked = noise(bucket + 1, 100).to(dtype), noise(bucket + 1), noise(bucket)
    return Call(_on(device, *_verdicts(dtype, bucket, share), *parked), {3: 1, 4: 1, 5: 0})


def _verdicts(dtype: torch.dtype, bucket: int, share: float) -> tuple[Tensor, ...]:
    """p, rows of which the last is padding where there are several, and what was encoded."""
    opens = torch.rand(bucket, generator=torch.Generator().manual_seed(bucket)) < share
    rows = torch.arange(1, bucket + 1).flip(0)
    rows[1:][-1:] = 0
    return torch.where(opens, 0.75, 0.25), rows, noise(bucket, 100, seed=1).to(dtype)


def _draw(seed: int, dtype: torch.dtype, device: torch.device) -> Call:
    draw = torch.Generator().manual_seed(seed)
    count = 32
    logits = noise(count, 300, seed=seed)[:, 20:276] * 4
    logits[0, 3] = float("nan")  # no byte comes of it

    def among(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (count,), generator=draw)]

    def some(*shape: int) -> Tensor:
        found = torch.rand(shape, generator=draw) < (0.02, 0.5, 1.0)[seed % 3]
        found[..., 7] = True
        return found

    columns = among(0.0, 0.3, 1.0, 2.0), among(1.0, 0.9, 0.5), among(0.0, 0.0, 0.05), among(0.1, 0.3, 0.6, 0.8)
    numbers = torch.stack((*columns, among(0, 1, 3, 40, 256), among(-1, 0, 8), among(-1, 0, 7)))
    places = torch.randperm(count, generator=draw) if seed % 2 else None
    rows, following = torch.arange(1, count + 1).flip(0), torch.randint(9, (9 * 256,), generator=draw)
    projected, at, told, given, masks, after = _on(
        device,
        (logits.round() if seed > 1 else logits).to(dtype),
        rows,
        numbers,
        some(count, 2, 256),
        some(72, 256),
        following,
    )
    written = _on(
        device, torch.arange(count + 1) % 9, torch.zeros(count + 1).long(), torch.zeros(count, 256), torch.zeros(count)
    )
    where = None if places is None else places.to(device)
    return Call((projected, at, where, told, given, masks, after, *written), {7: 1, 8: 1, 9: 0, 10: 0})


def _real(rows: Sequence[int]) -> list[int]:
    return [index for index, row in enumerate(rows) if row]


def _on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies, with strides of their own: views are taken of what is there."""
    return tuple(tensor.to(device) for tensor in tensors)
