"""Runs inside llama.cpp's own environment: makes a dense model of random weights and times its decoding.

    python peer_llama.py make FILE LAYERS WIDTH MLP HEADS VOCAB bf16|q8_0
    python peer_llama.py time FILE THREADS STEPS

`time` prints a JSON object: seconds of every decoded token. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
import time


def make(path: str, layers: int, width: int, mlp: int, heads: int, vocab: int, kind: str) -> None:
    import gguf
    import numpy as np

    kinds = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocab)
    bytes_listed = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    fillers = [f"filler{index}".encode() for index in range(vocab - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *bytes_listed, *fillers])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(fillers))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        values = random.standard_normal((outputs, inputs), dtype=np.float32) * 0.02
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kinds[kind]), raw_dtype=kinds[kind])

    def vector(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))

    matrix("token_embd", vocab, width)
    matrix("output", vocab, width)
    vector("output_norm")
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}", width, width)
        for name, outputs, inputs in (("ffn_gate", mlp, width), ("ffn_up", mlp, width), ("ffn_down", width, mlp)):
            matrix(f"blk.{layer}.{name}", outputs, inputs)
        vector(f"blk.{layer}.attn_norm")
        vector(f"blk.{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: str, threads: int, steps: int) -> None:
    import llama_cpp
    from llama_cpp import Llama

    if "q8_0" in path:
        # Its own AMX code for 8 bits ends this build with a segmentation fault; without such extra buffers it takes
        # its AVX-512 code, which reads the same bytes.
        plain = llama_cpp.llama_model_default_params()
        plain.use_extra_bufts = False
        llama_cpp.llama_cpp.llama_model_default_params = lambda: plain
    model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval([1] + [100] * 63)
    seconds = []
    for step in range(steps + 2):
        started = time.perf_counter()
        model.eval([97 + step % 26])
        if step >= 2:
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], *map(int, sys.argv[3:8]), sys.argv[8])
    else:
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
