"""What a model writes, with marks where its chunks open. Knows exported models and the runtime's engine; no training.

A mark is one `|` for each stage that opened a chunk before the character.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hnet_runtime.config import BOS
from hnet_runtime.engine.engine import Engine
from hnet_runtime.engine.messages import Chunk, SamplingParams

MARK = "|"


def write_samples(folder: Path, prompts: Sequence[str], count: int, *, temperature: float = 0.7) -> list[str]:
    """A continuation of each prompt by the model in `folder`, `count` bytes long, prompt and marks included.

    The same model writes the same samples: seeds are 0, 1, … in the prompts' order.
    """
    engine = Engine.from_pretrained(str(folder), device="cpu")
    params = [
        SamplingParams(max_tokens=count, temperature=temperature, seed=seed, return_chunks=True)
        for seed in range(len(prompts))
    ]
    texts = [bytes([BOS]) + prompt.encode() for prompt in prompts]
    return [
        marked(text + completion.data, completion.chunks)
        for text, completion in zip(texts, engine.generate(texts, params), strict=True)
    ]


def marked(data: bytes, chunks: Sequence[Chunk]) -> str:
    """The text with a mark before each byte that opens a chunk, as often as stages do; before a character where the
    byte lies in one. Offsets count from `data`'s first byte, a BOS, which is left out."""
    opened: dict[int, int] = {}
    for chunk in chunks:
        start = chunk.start
        while 0 < start < len(data) and 0x80 <= data[start] < 0xC0:
            start -= 1
        opened[start] = max(opened.get(start, 0), chunk.stage)
    cuts = sorted(start for start in opened if 1 < start < len(data))
    parts = [data[begin:end] for begin, end in zip([1, *cuts], [*cuts, len(data)], strict=True)]
    marks = ["", *(MARK * opened[cut] for cut in cuts)]
    return "".join(mark + part.decode(errors="replace") for mark, part in zip(marks, parts, strict=True))
