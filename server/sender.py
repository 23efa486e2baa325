"""The engine's messages on their way out: encoded and sent in a thread of their own, in order.

The model's thread only hands them over and goes on; its kernels leave Python's lock to whoever encodes
meanwhile. Knows a socket and messages; no engine. Nothing is merged and nothing is kept back.
"""

from __future__ import annotations

import logging
import queue
import threading

import msgspec
import zmq

from hnet_runtime.engine.messages import EngineFailure, FromEngine

log = logging.getLogger("hnet.engine")


class Sender:
    """Owns a socket that is connected and never blocks: nobody else uses it until `close` has returned.

    An error of the thread is raised where messages come from: by the next `put`, or by `close`. Nothing leaves after
    the message that was lost, but an EngineFailure.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._queue: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._is_told = False  # somebody has been given the error
        self._thread = threading.Thread(target=self._send_all, name="hnet-engine-sender", daemon=True)
        self._thread.start()

    def put(self, message: FromEngine) -> None:
        """Takes a message to send; raises what went wrong with one before it, except for an EngineFailure."""
        if self._error is not None and not isinstance(message, EngineFailure):
            self._is_told = True
            raise self._error
        self._queue.put(message)

    def close(self) -> None:
        """Returns once the socket has every message; raises an error that no `put` has raised."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and not self._is_told:
            self._is_told = True
            raise self._error

    def _send_all(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        while (message := self._queue.get()) is not None:
            if self._error is not None and not isinstance(message, EngineFailure):
                continue  # what follows a gap would be read as if there were none
            try:
                self._socket.send(encoder.encode(message))
            except Exception as error:
                log.exception("a message to the server is lost")
                self._error = error
