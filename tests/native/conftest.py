"""Fixtures of the native kernels' tests: every library this machine runs, models on it, its ops in torch's terms.

`HNET_NATIVE_LIBRARY` leaves one library, that one, as when the sanitizers watch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from platform import machine
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hnet_runtime.checkpoint import load_weights, locate
from hnet_runtime.config import ModelConfig
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.ops.native import binding, build
from hnet_runtime.ops.native.library import OVERRIDE, REFUSED, NativeLibrary, candidates
from hnet_runtime.ops.native.packing import PackedMatrix

TESTS = Path(__file__).parents[1]
GOLDEN = ("a_1stage", "b_2stage", "e_iso_T2", "g_2stage_bf16")
KEPT_FLOAT32 = (".mixer.D", ".residual_proj.weight", ".residual_proj.bias")  # as official bfloat16 checkpoints do


@cache
def fixtures_of(folder: str) -> ModuleType:
    """`tests/<folder>/conftest.py` under a name of its own: what models and engines are driven by there serves here."""
    name = f"hnet_test_fixtures_of_{folder}"
    spec = importlib.util.spec_from_file_location(name, TESTS / folder / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def built() -> build.Built | None:
    """The libraries of this machine as the sources are now; None where one library was named."""
    return None if os.environ.get(OVERRIDE) else build.build()


@cache
def library_of(isa: str) -> NativeLibrary | str:
    """One library, forced by its path; or why this machine cannot run it."""
    assert built() is None or not built().failed, str(built())
    candidate = next(candidate for candidate in candidates() if candidate.isa == isa)
    if candidate.path is None or not candidate.runnable:
        return candidate.reason
    calls = binding.load(candidate.path)  # one that should load and does not is a failure, not a reason to skip
    return NativeLibrary(isa, candidate.path, calls) if calls.hnet_usable() else REFUSED


def isas() -> list[str]:
    """Of this machine's family, best first; or of the one library that was named."""
    named = os.environ.get(OVERRIDE)
    return [Path(named).stem.removeprefix("libhnet_")] if named else [isa.name for isa in build.isas_of(machine())]


@pytest.fixture(params=isas())
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """Each library this machine can run, in turn; skipped with the reason where it cannot."""
    found = library_of(request.param)
    if isinstance(found, str):
        pytest.skip(f"{request.param}: {found}")
    return found


# ── models ────────────────────────────────────────────────────────────────────────────────────


@cache
def demo() -> tuple[ModelConfig, Mapping[str, Tensor]]:
    source = locate("demo")
    return source.config, load_weights(source, dtype=torch.float32)


@pytest.fixture
def case_named(golden_case, make_named_case) -> Callable[..., tuple[ModelConfig, Mapping[str, Tensor]]]:
    """`case_named(name)`: config and weights of a golden case, of a generated one, or of the `demo` model."""

    def find(name: str) -> tuple[ModelConfig, Mapping[str, Tensor]]:
        if name == "demo":
            return demo()
        case = golden_case(name) if name in GOLDEN else make_named_case(name)
        return case.config, case.weights

    return find


NativeOf = Callable[..., NativeHNet]


@pytest.fixture
def native_of(library: NativeLibrary) -> NativeOf:
    """`native_of(config, weights, numbers=None, threads=1, override=None)`: the model on this library.

    numbers: `float32`, `bfloat16`, `int8` (what is not in 8 bits in float32) or `int8_bfloat16`; None leaves the
    weights as they are.
    """

    def build_model(
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        numbers: str | None = None,
        threads: int = 1,
        override: RouterOverride | None = None,
    ) -> NativeHNet:
        tensors = dict(weights) if numbers is None else converted(weights, numbers)
        quantized = numbers is not None and numbers.startswith("int8")
        return NativeHNet(config, tensors, library.calls, threads, quantized=quantized, override=override)

    return build_model


def converted(weights: Mapping[str, Tensor], numbers: str) -> dict[str, Tensor]:
    dtype = torch.bfloat16 if numbers.endswith("bfloat16") else torch.float32
    return {key: tensor if key.endswith(KEPT_FLOAT32) else tensor.to(dtype) for key, tensor in weights.items()}


@pytest.fixture
def weights_in() -> Callable[[Mapping[str, Tensor], str], dict[str, Tensor]]:
    """`weights_in(weights, numbers)`: a copy of the mapping with tensors in `float32` or `bfloat16`."""
    return converted


@pytest.fixture
def rows_of() -> Any:
    """`rows_of(model, num_rows=16, max_positions=512)`: arenas whose rows can be fed and listened to."""
    return fixtures_of("model").Rows


@pytest.fixture
def driver_class() -> Any:
    """`driver_class(engine)`: turns an engine tick by tick and gathers what every request got."""
    return fixtures_of("engine").Driver


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """An engine sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ── single ops ────────────────────────────────────────────────────────────────────────────────


class SingleOps:
    """The calls of twins.h and the matrix product, tensors in and out."""

    def __init__(self, library: NativeLibrary) -> None:
        self.calls = binding.single_ops(library.calls)
        self.lanes = int(library.calls.hnet_lanes())

    def each(self, name: str, x: Tensor) -> Tensor:
        """exp, silu, softplus, to_bf16 (→ the bits) or from_bf16 (of bits), element by element."""
        y = torch.empty_like(x, dtype=torch.int16 if name == "to_bf16" else torch.float32)
        getattr(self.calls, f"hnet_{name}")(x.contiguous().data_ptr(), x.numel(), y.data_ptr())
        return y

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self.calls.hnet_rms_norm(x.data_ptr(), weight.data_ptr(), *x.shape, out.data_ptr())
        return out

    def gated_rms_norm(self, y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(y)
        self.calls.hnet_gated_rms_norm(y.data_ptr(), gate.data_ptr(), weight.data_ptr(), *y.shape, out.data_ptr())
        return out

    def causal_conv(self, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, part: int = 1 << 20) -> Tensor:
        """x: [T, E] of one row, state: [K − 1, E] (updated in place), `part` channels at a time."""
        out, (length, channels) = torch.empty_like(x), x.shape
        self.calls.hnet_causal_conv(
            x.data_ptr(),
            length,
            state.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            len(weight),
            channels,
            part,
            out.data_ptr(),
        )
        return out

    def selective_scan(
        self, x: Tensor, dt: Tensor, bc: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor, state: Tensor
    ) -> Tensor:
        """x: [T, H, P], dt: [T, H] before softplus, bc: [T, 2N] of one row, state: [H, P, N] (updated in place)."""
        y, (length, heads, _) = torch.empty_like(x), x.shape
        pointers = [tensor.data_ptr() for tensor in (x, dt, bc, a, d, dt_bias)]
        self.calls.hnet_selective_scan(*pointers, length, heads, state.shape[-1], state.data_ptr(), y.data_ptr())
        return y

    def rotate(self, head: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """head: [P], cos, sin: [half]."""
        turned = head.clone()
        self.calls.hnet_rotate(turned.data_ptr(), cos.data_ptr(), sin.data_ptr(), len(cos))
        return turned

    def attend(
        self, qkv: Tensor, row: int, start: int, window: int, slots: binding.Slots, keys: Tensor, values: Tensor
    ) -> Tensor:
        """qkv: [T, 3, H, P] of one row; keys, values: [slots, H, P] (updated in place) → [T, H, P]."""
        length, _, heads, head_dim = qkv.shape
        out = torch.empty(length, heads, head_dim)
        bf16 = keys.dtype is torch.bfloat16
        stores = keys.data_ptr(), values.data_ptr(), out.data_ptr()
        where = ctypes.byref(slots)
        self.calls.hnet_attend(
            qkv.contiguous().data_ptr(), heads, head_dim, row, start, length, window, where, bf16, *stores
        )
        return out

    def product(
        self,
        matrix: PackedMatrix,
        x: Tensor,
        *,
        onto: Tensor | None = None,
        threads: int = 1,
        spare: int = 0,
        stride: int = 0,
    ) -> Tensor:
        """[rows, N] = x Wᵀ + bias, or `onto` plus that. What stands behind the columns written, and in `spare` more
        rows, must stay as it was. stride: of x's rows, K where 0."""
        rows, k = x.shape
        wide = -(-matrix.outputs // self.lanes) * self.lanes
        y = torch.full((rows + spare, wide + self.lanes), 12345.0)
        if onto is not None:
            y[:rows, : matrix.outputs] = onto
        given = torch.full((rows, stride or k), float("nan"))
        given[:, :k] = x
        struct = matrix.struct()
        self.calls.hnet_product(
            ctypes.byref(struct),
            given.data_ptr(),
            given.shape[1],
            rows,
            y.data_ptr(),
            y.shape[1],
            onto is not None,
            threads,
        )
        assert (y[:, wide:] == 12345.0).all()
        assert (y[rows:] == 12345.0).all()
        return y[:rows, : matrix.outputs].clone()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, K] → numbers [T, K rounded up to 4] uint8 and scale [T]."""
        rows, k = x.shape
        q, scale = torch.empty(rows, -(-k // 4) * 4, dtype=torch.uint8), torch.empty(rows)
        self.calls.hnet_quantize(x.contiguous().data_ptr(), rows, k, q.data_ptr(), scale.data_ptr())
        return q, scale


@pytest.fixture
def ops(library: NativeLibrary) -> SingleOps:
    return SingleOps(library)


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """`noise(*shape, seed=0)`: normal numbers, fp32."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw
