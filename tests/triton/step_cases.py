"""Every Triton op of a step against its torch twin, in the interpreter.

Not collected by itself: `test_step_kernels.py` runs it in a process of its own with TRITON_INTERPRET=1. Each function
is named after its op. Programs are few: each costs milliseconds whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig, tensor_shapes
from hnet_runtime.gpu_doctor.kernel_cases import SMALL, step_cases
from hnet_runtime.gpu_doctor.kernel_group import STEP
from hnet_runtime.model.captured import step_kinds
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops import attention, conv, ema, norm, router, ssm, swiglu
from hnet_runtime.ops.rotary import rotary_table
from hnet_runtime.ops.triton import attention as triton_attention
from hnet_runtime.ops.triton import conv as triton_conv
from hnet_runtime.ops.triton import ema as triton_ema
from hnet_runtime.ops.triton import norm as triton_norm
from hnet_runtime.ops.triton import router as triton_router
from hnet_runtime.ops.triton import ssm as triton_ssm
from hnet_runtime.ops.triton import swiglu as triton_swiglu
from hnet_runtime.ops.triton.launching import OPERATIONS
from hnet_runtime.state.rows import PAGE, PagePool, RingSlots
from tests.gpu.steps import StepSubject, captured
from tests.triton.boundary_cases import drawing_case
from tests.triton.closeness import close, noise

NUM_ROWS = 9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# A row alone; rows out of order; and a bucket padded with row 0.
ROWS = pytest.mark.parametrize("rows", [[3], [8, 2, 7], [5, 1, 0, 0, 0]], ids=["one", "some", "padded"])


def arenas_agree(op: Callable[..., Tensor], twin: Callable[..., Tensor], rows: list[int], *arguments: Tensor) -> None:
    """Runs both on their own copies of `arguments`; outputs of rows that do not pad, and arenas but for row 0, agree.

    Arenas are the arguments of NUM_ROWS rows.
    """
    theirs = [each.clone() if each.is_contiguous() else each for each in arguments]
    expected = twin(*theirs)
    found = op(*arguments)
    real = [index for index, row in enumerate(rows) if row]
    close(found[real], expected[real])
    for ours, other in zip(arguments, theirs, strict=True):
        if ours.shape[:1] == (NUM_ROWS,):
            close(ours[1:], other[1:])


@DTYPES
@pytest.mark.parametrize("width", [8, 100, 1024, 1536])
@pytest.mark.parametrize("begins", [False, True])
def test_add_rms_norm(dtype, width, begins):
    h, residual, weight = noise(3, width).to(dtype), noise(3, width, seed=1), noise(width, seed=2)
    if begins:
        residual.fill_(float("nan"))
    expected_residual = residual.clone()
    expected = norm.add_rms_norm(h, expected_residual, weight, begins)
    close(triton_norm.add_rms_norm(h, residual, weight, begins), expected)
    assert torch.equal(residual, expected_residual)


@DTYPES
def test_add_rms_norm_of_a_strided_view_and_of_zeros(dtype):
    h, residual, weight = noise(3, 300).to(dtype)[:, 50:150], noise(3, 100, seed=1), noise(100, seed=2)
    h[1], residual[1] = 0.0, 0.0
    expected = norm.add_rms_norm(h, residual.clone(), weight, False)
    close(triton_norm.add_rms_norm(h, residual, weight, False), expected)


@DTYPES
@pytest.mark.parametrize("width", [7, 100, 2048])
def test_gated_norm_step(dtype, width):
    gate = (noise(3, 2 * width + 9) * 20).to(dtype)[:, 5 : 5 + width]
    y, weight = noise(3, width, seed=1).to(dtype), noise(width, seed=2)
    close(triton_norm.gated_norm_step(y, gate, weight), norm.gated_norm_step(y, gate, weight))


@DTYPES
@ROWS
@pytest.mark.parametrize("taps", [2, 4, 6])
@pytest.mark.parametrize("width", [20, 600])
def test_conv_step(dtype, rows, taps, width):
    state = noise(NUM_ROWS, taps - 1, width).to(dtype)
    weight, bias = noise(taps, width, seed=1), noise(width, seed=2)
    for tick in range(2):
        x = noise(len(rows), width + 50, seed=10 + tick).to(dtype)[:, 7 : 7 + width]
        arenas_agree(triton_conv.conv_step, conv.conv_step, rows, x, state, torch.tensor(rows), weight, bias)


@DTYPES
@ROWS
@pytest.mark.parametrize(("heads", "head_dim", "states"), [(3, 5, 7), (2, 24, 16), (1, 64, 128), (1, 16, 100)])
def test_ssm_step(dtype, rows, heads, head_dim, states):
    inner = heads * head_dim
    state = noise(NUM_ROWS, heads, head_dim, states)
    a, dt_bias, d = -torch.exp(noise(heads, seed=1)), noise(heads, seed=2) * 5, noise(heads, seed=3)
    for tick in range(2):
        projected = noise(len(rows), 11 + inner + 2 * states + heads, seed=10 + tick).to(dtype)
        xbc, dt = projected[:, 11 : 11 + inner + 2 * states], projected[:, 11 + inner + 2 * states :]
        arenas_agree(triton_ssm.ssm_step, ssm.ssm_step, rows, xbc, dt, a, dt_bias, d, state, torch.tensor(rows))


def test_ssm_step_takes_steps_of_any_size():
    """Where dt is tiny, softplus must keep its relative precision: it is eˣ, not 0."""
    heads = 16
    dt = torch.linspace(-30.0, 40.0, heads)[None, :]
    state, xbc = noise(NUM_ROWS, heads, 1, 1), torch.ones(1, heads + 2)
    state[1] = 0.0
    a, zero = torch.zeros(heads), torch.zeros(heads)
    triton_ssm.ssm_step(xbc, dt, a, zero, zero, state, torch.tensor([1]))
    expected = torch.nn.functional.softplus(dt[0].double())
    assert torch.allclose(state[1, :, 0, 0].double(), expected, rtol=1e-6, atol=0.0)


@DTYPES
@pytest.mark.parametrize("width", [3, 100, 700])
def test_swiglu(dtype, width):
    y = (noise(3, 2 * width + 30) * 5).to(dtype)[:, 4 : 4 + 2 * width]
    close(triton_swiglu.swiglu(y), swiglu.swiglu(y))


@DTYPES
@ROWS
@pytest.mark.parametrize("width", [8, 100, 1024])
def test_router_step(dtype, rows, width):
    memory, q_weight, k_weight = noise(NUM_ROWS, width).to(dtype), noise(width, width, seed=1), noise(width, width)
    for tick in range(2):
        positions = torch.tensor([(row + tick) % 3 for row in rows])
        h = noise(len(rows), width + 8, seed=10 + tick).to(dtype)[:, 3 : 3 + width]
        arenas_agree(
            triton_router.router_step,
            router.router_step,
            rows,
            h,
            memory,
            torch.tensor(rows),
            positions,
            q_weight,
            k_weight,
        )


def test_router_step_rounds_a_tie_as_the_twin_does():
    """1 − cos on either side of 1, within half a unit: in bf16 that is p = 0.5 exactly, which is no boundary."""
    angles = torch.tensor([0.0, 1e-3, -1e-3, 1.9e-3, 2.1e-3, -3.8e-3, -4.0e-3, 1.0])
    q, k = torch.zeros(len(angles), 2), torch.zeros(len(angles), 2)
    q[:, 0] = 1.0
    k[:, 0], k[:, 1] = torch.sin(angles), torch.cos(angles)
    q_weight = k_weight = torch.eye(2)
    rows = torch.arange(1, len(angles) + 1)
    never = torch.ones(len(angles), dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.cat((torch.zeros(1, 2), q)).to(dtype)
        arguments = k.to(dtype), memory, rows, never, q_weight, k_weight
        expected = router.router_step(*(each.clone() for each in arguments))
        found = triton_router.router_step(*arguments)
        assert torch.equal(found > 0.5, expected > 0.5)
        assert (found == 0.5).sum() == (expected == 0.5).sum() >= (1 if dtype == torch.float32 else 4)


def test_router_step_of_a_vector_that_is_zero_or_not_finite():
    memory, h, identity = noise(4, 8), noise(3, 8, seed=1), torch.eye(8)
    memory[2], h[2, 3] = 0.0, float("nan")
    arguments = h, memory, torch.tensor([1, 2, 3]), torch.tensor([4, 1, 9]), identity, identity
    expected = router.router_step(*(each.clone() for each in arguments))
    found = triton_router.router_step(*arguments)
    close(found, expected)
    assert found[2].isnan()
    assert not bool(found[2] > 0.5)


@DTYPES
@ROWS
@pytest.mark.parametrize("width", [12, 700])
def test_ema_step(dtype, rows, width):
    memory, count = noise(NUM_ROWS, width), len(rows)
    z = noise(count + 1, width + 4, seed=1).to(dtype)
    z[count] = float("nan")  # what a row that opened no chunk must not take up
    opened = torch.tensor([index % 2 == 0 for index in range(count)])
    place = torch.tensor([count - 1 - index if opened[index] else count for index in range(count)])
    p = torch.where(opened, torch.tensor([1.0, 0.2, 0.7, 0.50001, 0.0])[:count], float("nan"))
    given = memory, torch.tensor(rows), noise(count, width, seed=2)
    arenas_agree(triton_ema.ema_step, ema.ema_step, rows, z, place, p, opened, *given)
    close(triton_ema.ema_kept(*given, dtype), ema.ema_kept(*given, dtype))


KEYS = [(-1, True), (70, True), (300, True), (0, False), (5, False), (63, False), (64, False), (300, False)]


@DTYPES
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(2, 16, 8), (1, 15, 6), (6, 24, 0), (1, 64, 64)])
def test_rotate_and_keep(dtype, heads, head_dim, rotary_dim):
    qkv = noise(4, 3, heads, head_dim).to(dtype)
    positions, slots = torch.tensor([0, 1, 777, 12345]), torch.tensor([9, 4, 11, 0])
    ours = [noise(12, heads, head_dim, seed=seed).to(dtype) for seed in (1, 2)]
    theirs = [each.clone() for each in ours]
    found = triton_attention.rotate_and_keep(qkv, positions, slots, ours[0], ours[1], rotary_dim)
    close(found, attention.rotate_and_keep(qkv, positions, slots, theirs[0], theirs[1], rotary_dim))
    close(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_rotate_and_keep_keeps_in_another_dtype_what_the_model_rounded(kept):
    qkv, positions, slots = noise(2, 3, 2, 16).bfloat16(), torch.tensor([3, 50]), torch.tensor([1, 2])
    ours, theirs = ([torch.zeros(3, 2, 16, dtype=kept) for _ in range(2)] for _ in range(2))
    triton_attention.rotate_and_keep(qkv, positions, slots, ours[0], ours[1], 8)
    attention.rotate_and_keep(qkv, positions, slots, theirs[0], theirs[1], 8)
    assert ((ours[0] - theirs[0]).abs() <= 2.0**-7 * theirs[0].abs() + 1e-6).all()
    assert torch.equal(ours[1], theirs[1])


def test_the_angles_are_the_twins():
    cos, sin = rotary_table(torch.tensor([100_000]), 32)
    angle = 100_000 * triton_attention._frequencies(32, torch.device("cpu"))
    assert torch.equal(torch.cos(angle), cos[0, 0])
    assert torch.equal(torch.sin(angle), sin[0, 0])


@pytest.mark.parametrize(("window", "paged"), KEYS)
@pytest.mark.parametrize(("dtype", "heads", "head_dim"), [(torch.bfloat16, 1, 64), (torch.float32, 2, 15)])
def test_decode_attention(dtype, window, paged, heads, head_dim):
    length, rows = 600, [7, 3, 0]
    table = capacity = None
    if paged:
        pool = PagePool(NUM_ROWS, 64, length)
        for row in (3, 7):
            pool.reserve(row, length)
        table, count = torch.from_numpy(pool.table), (pool.num_pages + 1) * PAGE
    else:
        capacity = RingSlots(window + 1).capacity
        count = NUM_ROWS * capacity
    k, v = (noise(count, heads, head_dim, seed=seed).to(dtype) for seed in (1, 2))
    for tick, positions in enumerate([[0, 63, 0], [255, 256, 5], [599, 319, 1]]):
        at = torch.tensor(positions)
        q = (noise(3, heads, head_dim, seed=10 + tick) * 2).to(dtype)
        unseen = ~torch.isin(torch.arange(count), seen_slots(torch.tensor(rows), at, table, window, capacity).unique())
        keys, values = k.clone(), v.clone()
        keys[unseen], values[unseen] = float("nan"), float("nan")
        found = triton_attention.decode_attention(
            q, keys, values, torch.tensor(rows), at, table, window, capacity, length
        )
        expected = attention.decode_attention(q, k, v, torch.tensor(rows), at, table, window, capacity, length)
        close(found, expected)


def seen_slots(rows: Tensor, at: Tensor, table: Tensor | None, window: int, capacity: int | None) -> Tensor:
    return torch.cat(
        [
            attention.key_slots(
                rows[i : i + 1],
                torch.arange(0 if window < 0 else max(0, int(at[i]) - window), int(at[i]) + 1)[None, :],
                table,
                capacity,
            )[0]
            for i in range(len(rows))
        ]
    )


def test_decode_attention_of_huge_scores_and_of_a_row_that_is_not_finite():
    k, v, q = noise(3 * 8, 1, 16, seed=1) * 1e10, noise(3 * 8, 1, 16, seed=2), noise(2, 1, 16) * 1e10
    k[8:16] = float("nan")
    arguments = q, k, v, torch.tensor([2, 1]), torch.tensor([6, 6]), None, 7, 8, 1000
    found = triton_attention.decode_attention(*arguments)
    close(found, attention.decode_attention(*arguments))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_decode_attention_gives_a_row_its_bits_in_any_company_place_and_capacity():
    length, rows = 600, [7, 3, 5]
    pool = PagePool(NUM_ROWS, 64, length)
    for row in rows:
        pool.reserve(row, length)
    k, v, q = noise(65 * PAGE, 1, 32, seed=1), noise(65 * PAGE, 1, 32, seed=2), noise(3, 1, 32)
    at, table = torch.tensor([599, 300, 299]), torch.from_numpy(pool.table)
    together = triton_attention.decode_attention(q, k, v, torch.tensor(rows), at, table, -1, None, length)
    for index, row in enumerate(rows):
        own = slice(index, index + 1)
        wider = torch.cat((table, torch.zeros(NUM_ROWS, 30, dtype=torch.int64)), 1)
        for pages, most in ((table, int(at[index]) + 1), (wider, 2 * length)):
            alone = triton_attention.decode_attention(q[own], k, v, torch.tensor([row]), at[own], pages, -1, None, most)
            # One piece is divided at once, several are added first: the same sums, a division of equal numbers.
            close(alone, together[own], 1e-7)


@pytest.mark.parametrize("case", list(step_cases(SMALL)), ids=lambda case: f"{case.op} {case.name}")
def test_case_of_the_checks_on_a_gpu(case):
    """What `hnet doctor --gpu` looks at, in small: found right here, a kernel that is not has itself to blame there."""
    case.compare(getattr(StepOps.triton(), case.op), getattr(StepOps.torch(), case.op), torch.device("cpu"), STEP)


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_declared_op(op):
    """What torch is told of an op (what it changes, what it gives) is so: checked by torch's own opcheck."""
    rows, some = torch.tensor([1, 2]), torch.tensor([True, False])
    pages = torch.zeros(3, 2, dtype=torch.int64)
    cases = {
        "add_rms_norm": (noise(2, 8), noise(2, 8), noise(8), False),
        "gated_norm_step": (noise(2, 8), noise(2, 20)[:, :8], noise(8)),
        "conv_step": (noise(2, 20)[:, :8], noise(3, 3, 8), rows, noise(4, 8), noise(8)),
        "ssm_step": (
            noise(2, 20),
            noise(2, 9)[:, :3],
            *noise(3, 3).unbind(0),
            noise(3, 3, 4, 4),
            rows,
        ),
        "swiglu": (noise(2, 8),),
        "router_step": (noise(2, 8), noise(3, 8), rows, rows, noise(8, 8), noise(8, 8)),
        "next_places": (rows, torch.arange(3), pages, None),
        "last_places": (rows, torch.arange(3), None, 5),
        "ema_step": (noise(2, 9), rows - 1, noise(2).abs(), some, noise(3, 8), rows, noise(2, 8)),
        "ema_kept": (noise(3, 8), rows, noise(2, 8), torch.bfloat16),
        "enter_step": (rows, rows, torch.arange(3), noise(256, 8), noise(2)),
        "resume_step": (rows, noise(3, 8), noise(2), noise(2)),
        "surface_step": (rows, noise(3, 8), noise(3)),
        "descend_step": (noise(2), rows, noise(2, 8), noise(2), noise(2)),
        "park_step": (noise(2), rows, noise(2, 8), noise(3, 8), noise(3), noise(2)),
        "rotate_and_keep": (
            noise(2, 3, 1, 8),
            rows,
            rows,
            noise(9, 1, 8),
            noise(9, 1, 8),
            4,
        ),
        "decode_attention": (
            noise(2, 1, 8),
            noise(64, 1, 8),
            noise(64, 1, 8),
            rows,
            rows,
            pages,
            -1,
            None,
            100,
        ),
        "draw_step": drawing_case(1, 3, False, torch.float32, True),
    }
    if op not in cases:
        pytest.skip("an op of prefill, which its own tests check")
    torch.library.opcheck(OPERATIONS[op], cases[op], test_utils=("test_schema", "test_faketensor"))


def test_arguments_that_would_be_copied_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        triton_norm.add_rms_norm(noise(2, 8), noise(2, 16)[:, ::2], noise(8), False)
    with pytest.raises(ValueError, match="contiguous"):
        triton_swiglu.swiglu(noise(16, 2).t())
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="a ring"):
        triton_attention.decode_attention(noise(1, 1, 8), noise(9, 1, 8), noise(9, 1, 8), one, one, None, -1, None, 9)


def test_a_whole_step():
    """Every kind of step of a model of three stages, kernels beside twins, from the same memory turn after turn."""
    config = ModelConfig.from_dict(
        {
            "arch_layout": ["m1T1", ["T1", ["T1"], "m1"], "m1"],
            "d_model": [32, 48, 64],
            "d_intermediate": [64, 64, 96],
            "vocab_size": 256,
            "ssm_cfg": {"d_conv": 4, "expand": 4, "d_state": 16, "chunk_size": 64},
            "attn_cfg": {"num_heads": [2, 3, 2], "rotary_emb_dim": [8, 8, 0], "window_size": [9, 70, -1]},
            "tie_embeddings": False,
        }
    )
    weights = {
        key: (noise(*shape, seed=seed) * 0.2 + (1.0 if "norm" in key else 0.0))
        for seed, (key, shape) in enumerate(tensor_shapes(config).items())
    }
    for stage, parks in step_kinds(len(config.stages)):
        ours, theirs = (
            StepSubject(captured(config, weights, ops=ops), stage, parks) for ops in (StepOps.triton(), StepOps.torch())
        )
        for turn in range(2):
            for subject in (ours, theirs):
                subject.fill(turn, 4)
                with torch.inference_mode():
                    subject.run(4)
            for name, found in ours.read(turn).items():
                close(found, theirs.read(turn)[name], 1e-4)
            for name, found in ours.state.items():
                own = found.shape[0] // ours.num_rows if found.shape[0] % ours.num_rows == 0 else PAGE
                close(found[own:], theirs.state[name][own:], 1e-4)
