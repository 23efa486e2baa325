"""The certificate of an HTTPS server, renewed while it runs."""

from __future__ import annotations

import asyncio
import ssl

from server import files


async def keep_current(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """Puts the files into `context` again whenever one of them has changed, until it is cancelled.

    Connections that are made from then on see the new certificate; those that are open stay as they are. Files that are
    no certificate with its key, as they may be for a moment while they are exchanged, change nothing.
    """

    def read() -> str:
        files.check_certificate(certfile, keyfile)  # first beside it: half of a pair would spoil the context
        files.load_certificate(context, certfile, keyfile)
        return "the certificate is in force"

    watched = files.WatchedFiles([certfile] if keyfile is None else [certfile, keyfile], read)
    while True:
        await asyncio.sleep(files.CHECK_SECONDS)
        watched.look()
