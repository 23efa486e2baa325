"""Files that settings name: whether they can be used, asked before anything starts, and whether they have changed.

Every ValueError's message begins with the setting's name.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECK_SECONDS = 1.0  # between two looks at what watched files are like

log = logging.getLogger("hnet.server")


class WatchedFiles:
    """Files whose content is in force, and is read again when one of them changes.

    `read` puts the content in force and says in words what that is; it raises ValueError for files that are no good,
    and then what was read before stays in force, which is logged once. The first time whoever watches gets the error.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], str]) -> None:
        self._paths = paths
        self._read = read
        self._complaint: str | None = None
        self._checked = time.monotonic()
        self._seen = self._state()
        read()

    def look(self) -> None:
        """Reads them if they have changed; asks for that once in CHECK_SECONDS at most."""
        if time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        seen, complaint = self._state(), None
        if seen != self._seen:
            try:
                log.info("%s has changed: %s", " or ".join(self._paths), self._read())
                self._seen = seen
            except ValueError as error:
                complaint = str(error)
        if complaint is not None and complaint != self._complaint:
            log.error("%s; what was read before stays in force", complaint)
        self._complaint = complaint

    def _state(self) -> list[tuple[int, int, int] | None]:
        """What changes with the files; None for one that is not there."""
        return [_state(Path(path)) for path in self._paths]


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def check_readable(name: str, path: str) -> None:
    """Raises ValueError for a path that is no file to be read."""
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from error


def read_keys(path: str) -> list[str]:
    """The keys of an `api_key_file`: one a line; blank lines and those that begin with `#` are none.

    Raises ValueError for a file that cannot be read or holds no key.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"api_key_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"api_key_file {path}: not UTF-8 text") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file {path}: holds no key")
    return keys


def check_certificate(certfile: str, keyfile: str | None) -> None:
    """Raises ValueError for PEM files that are no certificate and its key, or whose key wants a password."""
    load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certfile, keyfile)


def load_certificate(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """Puts them into `context`. Raises ValueError as `check_certificate` does; the context is of no use then."""
    for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        if path is not None:
            check_readable(name, path)
    try:
        # Without a password of our own OpenSSL would ask the terminal for one.
        context.load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else None
        if reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"ssl_keyfile {keyfile or certfile}: not the key of {certfile}") from error
        where = keyfile or "the same file"
        raise ValueError(
            f"ssl_certfile {certfile}: no certificate in PEM form with its unencrypted key in {where}"
        ) from error
