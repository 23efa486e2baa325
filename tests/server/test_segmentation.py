"""Verdicts as JSON, for the route and the command alike."""

from __future__ import annotations

from hnet_runtime.engine.messages import Chunk
from server.segmentation import segmentation

CHUNKS = (Chunk(1, 0, 1.0), Chunk(2, 0, 1.0), Chunk(1, 6, 0.75), Chunk(2, 6, 0.6), Chunk(1, 3, 0.9))


def test_each_stage_but_the_innermost_has_its_chunks_in_order() -> None:
    outer, inner = segmentation("m", CHUNKS, 12, 3)["stages"]
    assert outer == {"stage": 1, "boundaries": [0, 3, 6], "probabilities": [1.0, 0.9, 0.75], "bytes_per_chunk": 4.0}
    assert inner == {"stage": 2, "boundaries": [0, 6], "probabilities": [1.0, 0.6], "bytes_per_chunk": 6.0}


def test_a_stage_that_opened_nothing_has_no_bytes_per_chunk() -> None:
    (stage,) = segmentation("m", (), 5, 2)["stages"]
    assert (stage["boundaries"], stage["bytes_per_chunk"]) == ([], None)


def test_bytes_are_counted_as_tokens_and_one_stage_cuts_nothing() -> None:
    document = segmentation("m", (), 5, 1)
    assert document["stages"] == []
    assert (document["model"], document["input_bytes"]) == ("m", 5)
    assert document["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
