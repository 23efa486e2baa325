"""Where the completions of live requests stand in their constraints, and the threads that move them on.

The next mask mostly costs a few microseconds, less than to hand it to a thread, and is made where the byte was taken.
One that was dear the last time, and the compilation of a new constraint, is made in a thread beside the model's: a
request whose mask is not ready is not drawn for, and nobody else waits. What comes does not depend on the way.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from itertools import count
from queue import Empty, SimpleQueue

import numpy as np

from hnet_runtime.config import EOS
from hnet_runtime.engine.constraints import ConstraintError, Cursor, Mask, compiled
from hnet_runtime.engine.messages import Constraint

DEAR_SECONDS = 100e-6  # a mask that took so long has the next one made beside the model
GRACE_SECONDS = 2e-3  # that others wait for a mask that was cheap the last time

log = logging.getLogger("hnet.engine")


class Structure:
    """One completion's place in its constraint.

    Until it is `ready` it belongs to a worker, and nobody else does more than read its flags. `error` then says in one
    line what is wrong with the constraint, if anything.
    """

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._cursor: Cursor | None = None
        self._taken = b""  # not advanced over yet
        self.seconds = 0.0  # that the last mask took
        self.is_late = False  # its last mask was not ready when it was wanted
        self.is_moving = False  # a worker has it
        self.ready = False
        self.error: str | None = None

    @property
    def is_compiled(self) -> bool:
        return self._cursor is not None

    @property
    def mask(self) -> Mask:
        """[V] the bytes that may come, and at EOS whether the completion may end here."""
        assert self._cursor is not None
        return self._cursor.mask

    @property
    def forced(self) -> bytes:
        """The bytes that have to come now, where each is the only one that may."""
        assert self._cursor is not None
        return self._cursor.forced

    @property
    def may_end(self) -> bool:
        return bool(self.mask[EOS])

    @property
    def has_ended(self) -> bool:
        """Whether nothing may follow."""
        return self.may_end and np.count_nonzero(self.mask) == 1

    def permits(self, data: bytes) -> bool:
        """Whether these bytes may come next, one after the other."""
        assert self._cursor is not None
        return self._cursor.permits(data)

    def push(self, data: bytes) -> None:
        """The completion has gained bytes that the mask allowed; it is ready again at once where that is cheap."""
        self._taken += data
        if self.seconds > DEAR_SECONDS:
            self.ready = False
        else:
            self.advance()

    def advance(self) -> None:
        """Makes the next mask, here and now. Whatever goes wrong is the constraint's fault: it becomes `error`."""
        try:
            if self._cursor is None:
                constraint = compiled(self._constraint)
                began = time.perf_counter()
                self._cursor = constraint.begin()
            else:
                taken, self._taken = self._taken, b""
                began = time.perf_counter()
                self._cursor.advance(taken)
            self.seconds = time.perf_counter() - began
        except ConstraintError as error:
            self.error = str(error)
        except Exception:
            log.exception("a constraint could not be followed")
            self.error = "could not be followed"
        self.is_moving = False
        self.ready = True


class StructureWorkers:
    """Two threads that move structures on: one compiles, the other makes masks, the cheapest first. They end with the
    last reference to this object."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._queues: dict[str, SimpleQueue[Structure | None]] = {}

    def put(self, structures: Sequence[Structure]) -> None:
        """Sees to those that are not ready."""
        for structure in structures:
            if not (structure.ready or structure.is_moving):
                structure.is_moving = True
                self._queue("hnet-masks" if structure.is_compiled else "hnet-compiler").put(structure)

    def wait(self, structures: Sequence[Structure], seconds: float, *, for_all: bool = True) -> None:
        """Returns once all of them (or one of them) are ready, or time is up."""
        enough = all if for_all else any
        with self._moved:
            self._moved.wait_for(lambda: enough(each.ready for each in structures), seconds)

    def _queue(self, name: str) -> SimpleQueue[Structure | None]:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = SimpleQueue()
            threading.Thread(target=_work, args=(queue, self._moved), name=name, daemon=True).start()
            weakref.finalize(self, queue.put, None)
        return queue


def _work(queue: SimpleQueue[Structure | None], moved: threading.Condition) -> None:
    order = count()
    todo: list[tuple[float, int, Structure]] = []
    while True:
        try:
            while True:
                structure = queue.get(block=not todo)
                if structure is None:
                    return
                heapq.heappush(todo, (structure.seconds, next(order), structure))
        except Empty:
            _, _, structure = heapq.heappop(todo)
        structure.advance()
        with moved:
            moved.notify_all()
