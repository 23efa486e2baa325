"""`python -m training.corpora`: lists the sources of training data, and builds a corpus of them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training.corpora.build import build
from training.corpora.errors import CorpusError
from training.corpora.sources import CORPORA


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 after one line on standard error that says what went wrong."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            print(table())
            return 0
        manifest = build(
            options.corpus,
            options.output,
            cache=options.cache,
            extra=options.extra,
            extra_licence=options.extra_licence,
            hold_out=options.holdout,
            without=options.without,
        )
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, file in manifest["files"].items():
        print(f"{options.output / name}: {file['bytes']} bytes, {file['documents']} documents, {file['sha256']}")
    print(f"held out: {', '.join(manifest['held_out'])}")
    return 0


def table() -> str:
    """The sources of all corpora, a line each, in columns: sizes are those of the packages' files in kB."""
    rows = [("corpus", "source", "from", "package", "version", "kB", "licence")]
    for corpus, sources in CORPORA.items():
        for source in sources:
            size = f"{source.bytes / 1000:.0f}"
            origin = (str(source.registry), source.package, source.version)
            rows.append((corpus, source.name, *origin, size, source.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.corpora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the packages that the corpora are made of")
    making = commands.add_parser("build", help="fetch, clean and frame a corpus")
    making.add_argument("corpus", choices=sorted(CORPORA))
    making.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the corpus's files")
    making.add_argument("--cache", type=Path, default=_cache(), metavar="DIR", help="folder for packages")
    making.add_argument("--extra", type=Path, metavar="FILE", help="a .txt or .txt.xz, documents parted by NUL bytes")
    making.add_argument(
        "--extra-licence", default="not stated", metavar="TEXT", help="what the manifest says of the extra text"
    )
    making.add_argument(
        "--holdout", action="append", default=[], metavar="TITLE", help="hold out this book, or extra:FIRST-LAST"
    )
    making.add_argument("--without", action="append", default=[], metavar="SOURCE", help="leave out a source")
    return parser


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hnet-serve" / "packages"


if __name__ == "__main__":
    sys.exit(main())
