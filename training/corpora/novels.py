"""Novels out of an R package's lazily loaded data: character vectors, one string a line of the book."""

import struct
import zlib
from collections.abc import Iterator

from training.corpora.errors import CorpusError

STRINGS = 16  # the type of a character vector in R's serialization
MAGIC = b"X\n"


def novels(database: bytes) -> Iterator[str]:
    """The text of each character vector in an `.rdb` file, its strings joined by newlines.

    The file is a row of blocks: four bytes of the unpacked length (big-endian), then zlib's stream.
    Raises CorpusError when it is not.
    """
    rest = database
    while rest:
        unpack = zlib.decompressobj()
        try:
            value = unpack.decompress(rest[4:])
        except zlib.error:
            raise CorpusError("the R package's data is not compressed by zlib") from None
        if not unpack.eof or len(value) != int.from_bytes(rest[:4], "big"):
            raise CorpusError("the R package's data ends in the middle of a value")
        rest = unpack.unused_data
        yield "\n".join(_strings(value))


def _strings(value: bytes) -> Iterator[str]:
    position = len(MAGIC) + 12  # the format's version and two versions of R
    if not value.startswith(MAGIC):
        raise CorpusError("the R package's data is not in R's binary serialization")
    if int.from_bytes(value[2:6], "big") >= 3:  # from version 3 on, the native encoding's name comes next
        position += 4 + int.from_bytes(value[position : position + 4], "big")
    flags, count = struct.unpack_from(">II", value, position)
    if flags & 0xFF != STRINGS:
        raise CorpusError("the R package's data holds something else than strings")
    position += 8
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", value, position)
        position += 8
        if length < 0:  # R's "not available"
            continue
        yield value[position : position + length].decode()
        position += length
