"""Loading and converting need the model plus one tensor, and not a second copy of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hnet_runtime.checkpoint import convert, load_weights, locate
from hnet_runtime.config import ModelConfig, tensor_shapes

MIB = 2**20
SLACK = 24 * MIB  # the interpreter's own growth, and pages the allocator has not handed back
DOCUMENT = {
    "arch_layout": ["m1", ["T4"], "m1"],
    "d_model": [512, 1024],
    "d_intermediate": [0, 2816],
    "ssm_cfg": {"d_conv": 4, "d_state": 64, "expand": 2},
    "attn_cfg": {"num_heads": [8, 16], "rotary_emb_dim": [32, 32], "window_size": [-1, -1]},
}
# Anonymous memory is what a process holds for itself; pages of a mapped file can always be dropped and are not counted.
METER = """
import json, sys, threading, torch
from hnet_runtime.checkpoint import convert, load_weights, locate

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

work, model, dtype, destination = sys.argv[1:]
dtype = getattr(torch, dtype)
torch.zeros(1024, 1024).to(torch.bfloat16) @ torch.zeros(1024, 1).to(torch.bfloat16)
source = locate(model)
base = peak = anonymous()
over = threading.Event()

def watch():
    global peak
    while not over.wait(0.0005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
if work == "load":
    kept = load_weights(source, dtype=dtype)
elif work == "convert":
    convert(source, destination, dtype)
else:
    kept = {key: tensor.to(dtype) for key, tensor in torch.load(source.weights[0], weights_only=True).items()}
peak = max(peak, anonymous())
over.set()
watcher.join()
print(json.dumps(peak - base))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """About 200 MiB of float32 weights: `random/config.json`, `st/model.safetensors`, `pt/model.pt`."""
    root = tmp_path_factory.mktemp("large")
    (root / "random").mkdir()
    (root / "random" / "config.json").write_text(json.dumps(DOCUMENT))
    source = locate(f"random:{root / 'random'}")
    convert(source, root / "st")
    (root / "pt").mkdir()
    torch.save(load_weights(source, dtype=torch.float32), root / "pt" / "model.pt")
    (root / "pt" / "config.json").write_text(json.dumps(DOCUMENT))
    return root


def _model_and_tensor(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the model in `dtype`, and of its largest tensor in float32."""
    sizes = [torch.Size(shape).numel() for shape in tensor_shapes(ModelConfig.from_dict(DOCUMENT)).values()]
    return sum(sizes) * dtype.itemsize, max(sizes) * 4


def _growth(work: str, model: str, dtype: str, destination: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", METER, work, model, dtype, str(destination)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("pt", "float32"),
        ("pt", "bfloat16"),
        ("st", "bfloat16"),
        pytest.param("random", "bfloat16", marks=pytest.mark.slow),
        pytest.param("st", "float32", marks=pytest.mark.slow),
        pytest.param("random", "float32", marks=pytest.mark.slow),
    ],
)
def test_loading_needs_the_model_plus_one_tensor(large, tmp_path, form, dtype):
    model, tensor = _model_and_tensor(getattr(torch, dtype))
    name = f"random:{large / 'random'}" if form == "random" else str(large / form)
    growth = _growth("load", name, dtype, tmp_path / "out")
    assert model * 0.95 < growth < model + tensor + SLACK


@pytest.mark.parametrize("form", ["pt", "st"])
def test_converting_needs_one_tensor(large, tmp_path, form):
    _, tensor = _model_and_tensor(torch.bfloat16)
    assert _growth("convert", str(large / form), "bfloat16", tmp_path / "out") < 2 * tensor + SLACK


def test_the_meter_sees_a_second_copy(large, tmp_path):
    model, tensor = _model_and_tensor(torch.bfloat16)
    assert _growth("naive", str(large / "pt"), "bfloat16", tmp_path / "out") > model + tensor + SLACK
