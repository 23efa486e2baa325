"""The loop around an engine: take messages in, run a tick, send what it gave.

The same loop serves an engine in its own process and one in a thread. Knows the messages
of the engine's border and no transport: where messages come from and go to are two callables.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, Protocol

import msgspec

from hnet_runtime.engine.messages import (
    Abort,
    EngineFailure,
    EngineInfo,
    FromClient,
    FromEngine,
    Output,
    Request,
    Shutdown,
    Submit,
    Tick,
)

HEARTBEAT_SECONDS = 1.0  # an engine without work still says this often that it lives

log = logging.getLogger("hnet.engine")


class Engine(Protocol):
    """What the server needs of an engine. A tick without work is legal and cheap."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def tick(self) -> Tick: ...


Progress = Callable[[int, int], None]  # bytes of weights read, bytes of weights in all


class EngineLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """How to make an engine: `factory` is `"module:function"`, called with `arguments` as keywords
    and `progress`; it may raise ValueError, OSError or RuntimeError with a one-line message."""

    factory: str
    arguments: dict[str, Any] = {}

    def build(self, progress: Progress | None = None) -> Engine:
        module, _, function = self.factory.partition(":")
        engine: Engine = getattr(import_module(module), function)(**self.arguments, progress=progress)
        return engine


Receive = Callable[[float], Sequence[FromClient]]  # waits up to so many seconds for a first message
Send = Callable[[FromEngine], None]


def serve_engine(
    launch: EngineLaunch,
    receive: Receive,
    send: Send,
    loading: AbstractContextManager[Progress | None] = nullcontext(),  # noqa: B008  # it holds nothing
) -> bool:
    """Builds the engine and runs it until Shutdown (True) or a failure, which is sent and logged (False).

    `loading` is entered while the weights are read and gives who is told of it, if anybody.
    """
    try:
        with loading as progress:
            engine = launch.build(progress)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        send(EngineFailure(message=one_line(error)))
        return False
    except Exception as error:
        log.exception("the engine could not be built")
        send(EngineFailure(message=one_line(error)))
        return False
    send(engine.info)
    try:
        _run(engine, receive, send)
    except Exception as error:
        log.exception("the engine failed")
        send(EngineFailure(message=one_line(error)))
        return False
    return True


def _run(engine: Engine, receive: Receive, send: Send) -> None:
    while True:
        refused: list[Output] = []
        for message in receive(0.0 if engine.has_work else HEARTBEAT_SECONDS):
            match message:
                case Submit(request=request):
                    try:
                        engine.submit(request)
                    except ValueError as error:
                        refused.append(
                            Output(request_id=request.request_id, finish_reason="error", error=one_line(error))
                        )
                case Abort(request_id=request_id):
                    engine.abort(request_id)
                case Shutdown():
                    return
        tick = engine.tick()
        if refused:
            tick = msgspec.structs.replace(tick, outputs=(*refused, *tick.outputs))
        send(tick)


def one_line(error: BaseException) -> str:
    """An exception's message on one line; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
