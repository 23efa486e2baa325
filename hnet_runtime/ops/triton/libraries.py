"""Which code runs an op of prefill: a library's kernel where one is installed and computes the same, else ours.

Knows what the libraries' calls mean, by their documented signatures (mamba-ssm 2.3, causal-conv1d 1.7, flash-attn 2.8);
imports none of them, nor Triton, before it is asked to. Nothing of the libraries has run here: their adapters are
tested against stand-ins with the recorded signatures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from hnet_runtime.ops.prefill import OPS, Op


@dataclass(frozen=True)
class Library:
    """A call of another project. `parameters`: those that the adapter gives, by the names it gives them."""

    name: str
    module: str
    function: str
    parameters: tuple[str, ...]


CAUSAL_CONV1D = Library(
    "causal-conv1d", "causal_conv1d", "causal_conv1d_fn", ("x", "weight", "bias", "initial_states", "activation")
)
FLASH_ATTN = Library(
    "flash-attn",
    "flash_attn",
    "flash_attn_varlen_func",
    (
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *("softmax_scale", "causal", "window_size"),
    ),
)

MAMBA_SSM_DECLINED = (
    "its chunk scan takes one initial state a batch entry and starts every packed sequence from zero, so that rows "
    "that go on from a state would have to be padded to one length; and it rounds the state between chunks to the "
    "inputs' dtype, where decoding keeps fp32"
)
"""Why mamba-ssm is never taken: mamba_chunk_scan_combined's `initial_states` is (batch, nheads, headdim, dstate), with
`cu_seqlens` the batch is one, and states are passed on in the dtype of C."""


@dataclass(frozen=True)
class Choice:
    """What runs an op. `where`: the spans that `name` takes, if not all; the rest runs on `otherwise`. `declined`: why
    each of the others does not run it, in words."""

    op: Op
    name: str
    where: str = ""
    otherwise: str = ""
    declined: Mapping[str, str] = field(default_factory=dict)


def choose(device: torch.device, *, libraries: bool = True) -> dict[Op, Choice]:
    """What runs each op of prefill on a device.

    libraries: whether other projects' kernels may be taken. Ours alone give a row the same attention however
    its prompt is cut and the same scan where that is at multiples of 64 positions, bit for bit; flash-attn rounds
    softmax's weights to bf16, as the released model does, and takes no part in spans that go on from kept keys.
    """
    if device.type != "cuda":
        reason = f"needs a CUDA device; this is {device.type}"
        names = {"scan": ["mamba-ssm"], "convolution": ["causal-conv1d"], "attention": ["flash-attn"], "smoothing": []}
        return {op: Choice(op, "torch", declined=dict.fromkeys(["triton", *names[op]], reason)) for op in OPS}
    missing = _missing("triton")
    own = "torch" if missing else "triton"
    without = {"triton": missing} if missing else {}

    def library(op: Op, wanted: Library, where: str) -> Choice:
        reason = (
            "it runs only where kernels=libraries asks for it"
            if not libraries
            else missing and "its adapter uses Triton's kernels"
        )
        reason = reason or unusable(wanted)
        if reason:
            return Choice(op, own, declined={**without, wanted.name: reason})
        return Choice(op, wanted.name, where, own, without)

    return {
        "scan": Choice("scan", own, declined={**without, "mamba-ssm": MAMBA_SSM_DECLINED}),
        "convolution": library("convolution", CAUSAL_CONV1D, "spans of one length, 2 to 4 taps, channels in eights"),
        "attention": library("attention", FLASH_ATTN, "bf16 or fp16 spans that all begin at position 0"),
        "smoothing": Choice("smoothing", own, declined=without),
    }


def unusable(library: Library) -> str:
    """Why a library cannot be called as its adapter does; empty where it can."""
    if reason := _missing(library.module):
        return reason
    function = getattr(import_module(library.module), library.function, None)
    if function is None:
        return f"this version has no {library.function}"
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return f"the parameters of its {library.function} cannot be told"
    absent = [name for name in library.parameters if name not in known]
    return f"{library.function} of this version does not take {', '.join(absent)}" if absent else ""


def function_of(library: Library) -> Callable[..., Any]:
    """The call itself; ImportError or AttributeError where `unusable` says so."""
    function: Callable[..., Any] = getattr(import_module(library.module), library.function)
    return function


def _missing(module: str) -> str:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == module else f"does not import: {error}"
    except Exception as error:  # noqa: BLE001 a wheel built for another torch or CUDA fails in ways of its own
        return f"does not import: {error}"
    return ""
