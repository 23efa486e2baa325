"""The members of a package's file: a Debian package, a tarball or a wheel."""

import fnmatch
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.corpora.errors import CorpusError


def read_members(path: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """The members whose paths match a pattern (as of `fnmatch`), by path, in the order of their paths.

    Raises CorpusError when a pattern matches nothing or the file is not a package that can be read.
    """
    try:
        found = dict(_members(path, patterns))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise CorpusError(f"{path.name}: cannot be read as a package: {error}") from None
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            raise CorpusError(f"{path.name}: has no member {pattern}")
    return dict(sorted(found.items()))


def _members(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if _wanted(name, patterns):
                    yield name, wheel.read(name)
        return
    content = _debian_members(path) if path.suffix == ".deb" else path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and _wanted(name, patterns):
                file = archive.extractfile(member)
                assert file is not None  # said by isfile
                yield name, file.read()


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _debian_members(path: Path) -> bytes:
    client = shutil.which("dpkg-deb")
    if client is None:
        raise CorpusError(f"{path.name}: dpkg-deb is needed to unpack it and is not on this machine")
    done = subprocess.run([client, "--fsys-tarfile", str(path)], capture_output=True, check=False)
    if done.returncode != 0:
        raise CorpusError(f"{path.name}: dpkg-deb cannot unpack it")
    return done.stdout
