"""Which code runs prefill's ops is decided by what is installed and what it takes, and every refusal says why."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hnet_runtime.ops.triton import libraries
from hnet_runtime.ops.triton.libraries import CAUSAL_CONV1D, FLASH_ATTN, OPS, choose, unusable

ROOT = Path(__file__).parents[2]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """`installed(causal_conv1d=…, flash_attn=…)` puts modules with those functions where imports find them."""

    def install(**functions):
        for name in ("mamba_ssm", "causal_conv1d", "flash_attn"):
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
        for name, function in functions.items():
            module = ModuleType(name)
            if function is not None:
                setattr(module, function.__name__, function)
            monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("library_stand_ins")


def test_on_a_cpu_torch_runs_everything_and_each_library_is_told_why():
    for op, choice in choose(CPU).items():
        assert choice.op == op
        assert choice.name == "torch"
        assert all("CUDA" in reason for reason in choice.declined.values())
    assert choose(CPU)["attention"].declined.keys() == {"triton", "flash-attn"}


def test_on_cuda_without_libraries_ours_runs_everything(installed):
    pytest.importorskip("triton")
    installed()
    choices = choose(CUDA)
    assert set(choices) == set(OPS)
    assert {choice.name for choice in choices.values()} == {"triton"}
    assert choices["convolution"].declined == {"causal-conv1d": "not installed"}
    assert choices["attention"].declined == {"flash-attn": "not installed"}


def test_libraries_with_the_known_signatures_are_taken_for_the_spans_they_compute(installed, stand_ins):
    pytest.importorskip("triton")
    installed(causal_conv1d=stand_ins.causal_conv1d_fn, flash_attn=stand_ins.flash_attn_varlen_func)
    choices = choose(CUDA)
    assert choices["convolution"].name == "causal-conv1d"
    assert choices["attention"].name == "flash-attn"
    for op in ("convolution", "attention"):
        assert choices[op].where
        assert choices[op].otherwise == "triton"
        assert not choices[op].declined
    assert choices["scan"].name == "triton"
    assert "initial state" in choices["scan"].declined["mamba-ssm"]
    switched_off = choose(CUDA, libraries=False)
    assert {choice.name for choice in switched_off.values()} == {"triton"}
    assert switched_off["attention"].declined == {"flash-attn": "it runs only where kernels=libraries asks for it"}


def test_without_triton_torch_runs_everything(installed, stand_ins, monkeypatch):
    installed(causal_conv1d=stand_ins.causal_conv1d_fn, flash_attn=stand_ins.flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "triton", None)
    for choice in choose(CUDA).values():
        assert choice.name == "torch"
        assert choice.declined["triton"] == "not installed"
    assert "Triton" in choose(CUDA)["attention"].declined["flash-attn"]


def test_a_version_that_takes_other_parameters_is_declined_by_their_names(installed):
    def causal_conv1d_fn(x, weight, bias=None, activation=None): ...

    def flash_attn_varlen_func(*arguments): ...

    installed(causal_conv1d=causal_conv1d_fn, flash_attn=flash_attn_varlen_func)
    assert unusable(CAUSAL_CONV1D) == "causal_conv1d_fn of this version does not take initial_states"
    assert "does not take q, k, v" in unusable(FLASH_ATTN)
    installed(causal_conv1d=None)
    assert unusable(CAUSAL_CONV1D) == "this version has no causal_conv1d_fn"


def test_a_library_that_breaks_when_imported_is_declined_with_its_words(monkeypatch):
    def broken(name):
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(libraries, "import_module", broken)
    assert unusable(FLASH_ATTN) == "does not import: flash_attn: undefined symbol"


def test_asking_loads_no_triton():
    code = (
        "import sys, torch; from hnet_runtime.ops.triton.libraries import choose; "
        "choose(torch.device('cpu')); print('triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stdout + result.stderr
