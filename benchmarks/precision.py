"""What bfloat16 and 8 bits cost in quality: bits per byte, and the router's verdicts that flip, against float32.

    hnet bench precision [--model demo] [--text FILE] [--bytes 10000] [--json FILE]

The text (by default this project's licence, which no demo model was trained on) is read in pieces of 1,000 bytes,
each from an empty row, by the native forward in every kind of numbers. A flip is a verdict of stage 0 that float32
gives otherwise.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks.models import BOS, Rows, Variant, build, read_weights
from benchmarks.report import Row, finish, print_table

PIECE = 1000  # bytes read from an empty row
KINDS = (
    ("float32", Variant("float32", "native")),
    ("bfloat16", Variant("bfloat16", "native")),
    ("int8", Variant("float32", "native", "int8")),
    ("int8, else bfloat16", Variant("bfloat16", "native", "int8")),
)


def read_text(model: str, variant: Variant, data: bytes) -> tuple[float, list[bool]]:
    """Bits per byte of `data`, and stage 0's verdict at each of its bytes."""
    config, weights = read_weights(model, variant.dtype)
    rows = Rows(build(config, weights, variant), 1, PIECE + 1)
    bits, verdicts = 0.0, []
    for begin in range(0, len(data), PIECE):
        piece = data[begin : begin + PIECE]
        rows.restart()
        _, result = rows.run([BOS + piece], logits=len(piece) + 1)
        likelihood = torch.log_softmax(result.logits[:-1].double(), -1)
        bits -= float(likelihood[range(len(piece)), list(piece)].sum()) / math.log(2)
        verdicts += result.verdicts[0].boundary[1:].tolist()
    return bits / len(data), verdicts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, random:NAME or a directory")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    parser.add_argument("--bytes", type=int, default=10_000, dest="length")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    data = options.text.read_bytes()[: options.length]
    report: list[Row] = []
    table = []
    found = {name: read_text(options.model, variant, data) for name, variant in KINDS}
    exact, truth = found["float32"]
    for name, (bits, verdicts) in found.items():
        flips = sum(one != other for one, other in zip(verdicts, truth, strict=True)) * 10_000 / len(data)
        report += [
            Row(f"bits per byte {name}", bits, "bits", "bits per byte float32", bits / exact),
            Row(f"flips {name}", flips, "per 10,000 bytes"),
        ]
        table.append([name, f"{bits:.5f}", f"{bits - exact:+.5f}", f"{flips:.1f}"])
    print_table(
        f"{options.model}, {len(data)} bytes of {options.text.name}, {sum(truth)} chunks",
        ["", "bits per byte", "− float32", "flips per 10,000 bytes"],
        table,
    )
    finish("precision", report, options.json)


if __name__ == "__main__":
    main()
