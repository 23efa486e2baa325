"""The native library's C interface, mirrored for ctypes: structs field by field as in model.h, and calls.

Knows addresses and sizes; whoever fills a struct keeps the memory it points at alive. All strides
and counts are in elements.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

INTERFACE = 3  # what hnet_interface() must answer; raised with every change of a struct or call
FLOAT32, BFLOAT16, INT8 = range(3)


class NativeError(RuntimeError):
    """A native library that cannot be loaded or used; the message says which and why."""


class Matrix(Structure):
    """A packed matrix of n outputs and k inputs; `kind` INT8 has `scale` and `sum` by output."""

    _fields_ = (
        ("kind", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("sum", c_void_p),
    )


class Layer(Structure):
    """One block. `first_state` and `second_state` are conv and SSM arenas, or keys and values."""

    _fields_ = (
        ("is_attention", c_int64),
        ("has_mlp", c_int64),
        ("norm1", c_void_p),
        ("norm2", c_void_p),
        ("in_proj", Matrix),
        ("out_proj", Matrix),
        ("fc1", Matrix),
        ("fc2", Matrix),
        ("conv_weight", c_void_p),
        ("conv_bias", c_void_p),
        ("dt_bias", c_void_p),
        ("a", c_void_p),
        ("d", c_void_p),
        ("ssm_norm", c_void_p),
        ("first_state", c_void_p),
        ("second_state", c_void_p),
    )


class Stack(Structure):
    """Blocks in a row and the norm at their end."""

    _fields_ = (("num_layers", c_int64), ("layers", POINTER(Layer)), ("norm", c_void_p))


class Slots(Structure):
    """Where keys are kept: rings of `capacity` positions a row, or pages by `table` where capacity is 0."""

    _fields_ = (("capacity", c_int64), ("table", c_void_p), ("row_pages", c_int64))


class Stage(Structure):
    """One stage. The main network is an `encoder` alone; heads or ssm_heads 0 says that no layer has that mixer."""

    _fields_ = (
        ("d_model", c_int64),
        ("d_outer", c_int64),
        ("d_mlp", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_half", c_int64),
        ("window", c_int64),
        ("rotary_cos", c_void_p),
        ("rotary_sin", c_void_p),
        ("slots", Slots),
        ("ssm_heads", c_int64),
        ("d_state", c_int64),
        ("d_conv", c_int64),
        ("pad", c_void_p),
        ("encoder", Stack),
        ("decoder", Stack),
        ("q_proj", Matrix),
        ("k_proj", Matrix),
        ("residual", Matrix),
        ("router", c_void_p),
        ("ema", c_void_p),
        ("parked", c_void_p),
        ("parked_p", c_void_p),
        ("override_rate", c_double),
        ("override_key", c_uint64),
        ("positions", c_void_p),
    )


class Model(Structure):
    """A whole model; `bf16`: keys, values and the router's rounding are in bfloat16."""

    _fields_ = (
        ("num_stages", c_int64),
        ("stages", POINTER(Stage)),
        ("embeddings", c_void_p),
        ("head", Matrix),
        ("bf16", c_int64),
    )


class Draw(Structure):
    """How one row's next byte is drawn; `allowed`: [256] bytes, 0 where a byte may not come."""

    _fields_ = (
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("uniform", c_double),
        ("top_k", c_int64),
        ("allowed", c_void_p),
    )


class StageReport(Structure):
    """What a forward says of one stage: positions run, seconds, and for each position row, byte offset, p, boundary."""

    _fields_ = (
        ("positions", c_int64),
        ("seconds", c_double),
        ("rows", c_void_p),
        ("offsets", c_void_p),
        ("p", c_void_p),
        ("boundary", c_void_p),
    )


def load(path: Path) -> Any:
    """The library at `path` with its calls' types declared; raises NativeError if it is not ours."""
    try:
        library = ctypes.CDLL(str(path))
        found = library.hnet_interface
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path}: not a native library of this package: {error}") from error
    found.restype = c_int64
    if found() != INTERFACE:
        raise NativeError(f"{path}: built for interface {found()}, not {INTERFACE}; build the package again")
    try:
        _declare(library)
    except AttributeError as error:  # of the same interface by its number, yet older than these sources
        raise NativeError(f"{path}: lacks {str(error).rpartition(': ')[2]}; build the package again") from error
    return library


def _declare(library: Any) -> None:
    library.hnet_lanes.restype = c_int64
    library.hnet_usable.restype = c_int64
    library.hnet_word_multiple.restype = c_int64
    library.hnet_word_multiple.argtypes = (c_int64,)
    library.hnet_open.restype = c_void_p
    library.hnet_open.argtypes = (POINTER(Model), c_int64)
    library.hnet_close.restype = None
    library.hnet_close.argtypes = (c_void_p,)
    library.hnet_forward.restype = c_int64
    library.hnet_forward.argtypes = (c_void_p, c_int64, *(c_void_p,) * 5, POINTER(StageReport))
    library.hnet_step.restype = c_int64
    library.hnet_step.argtypes = (
        c_void_p,
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
        c_int64,
        *(c_void_p,) * 2,
        POINTER(StageReport),
    )
    library.hnet_sample.restype = None
    library.hnet_sample.argtypes = (c_int64, c_void_p, POINTER(Draw), c_void_p)
    library.hnet_product.restype = None
    library.hnet_product.argtypes = (POINTER(Matrix), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64)


def single_ops(library: Any) -> Any:
    """Declares the calls of twins.h, which hold the library's ops one by one against their torch twins."""
    calls: dict[str, tuple[Any, ...]] = {
        "hnet_exp": (c_void_p, c_int64, c_void_p),
        "hnet_silu": (c_void_p, c_int64, c_void_p),
        "hnet_softplus": (c_void_p, c_int64, c_void_p),
        "hnet_to_bf16": (c_void_p, c_int64, c_void_p),
        "hnet_from_bf16": (c_void_p, c_int64, c_void_p),
        "hnet_rms_norm": (c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        "hnet_gated_rms_norm": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        "hnet_causal_conv": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        "hnet_selective_scan": (*(c_void_p,) * 6, c_int64, c_int64, c_int64, c_void_p, c_void_p),
        "hnet_rotate": (c_void_p, c_void_p, c_void_p, c_int64),
        "hnet_attend": (c_void_p, *(c_int64,) * 6, POINTER(Slots), c_int64, c_void_p, c_void_p, c_void_p),
        "hnet_quantize": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
        "hnet_struct_sizes": (c_void_p,),
    }
    for name, argument_types in calls.items():
        call = getattr(library, name)
        call.restype, call.argtypes = None, argument_types
    return library
