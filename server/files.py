"""Files that settings name: whether they can be used, asked before anything starts.

Every ValueError's message begins with the setting's name.
"""

from __future__ import annotations

import ssl
from pathlib import Path


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
    try:
        # Without a password of our own OpenSSL would ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else None
        if reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"ssl_keyfile {keyfile or certfile}: not the key of {certfile}") from error
        where = keyfile or "the same file"
        raise ValueError(
            f"ssl_certfile {certfile}: no certificate in PEM form with its unencrypted key in {where}"
        ) from error
