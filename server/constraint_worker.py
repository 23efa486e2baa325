"""`python -m server.constraint_worker`: a process that tries to compile constraints, and may be killed for it.

A regular expression of a few characters can take any time and memory. The engine compiles only what was compiled here
before. Knows constraints; nothing of the server but `server.limited_process`.

A job is a constraint; it is answered by `{"tabulate"}`, whether the engine is to make a table, or by `{"error"}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hnet_runtime.engine.constraints import ConstraintError, compile_constraint
from hnet_runtime.engine.messages import Constraint
from server.limited_process import serve


def prepare(subject: None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def answer(job: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"tabulate": compile_constraint(msgspec.convert(job, Constraint)).is_table}
        except ConstraintError as error:
            return {"error": str(error)}
        except MemoryError:
            return {"error": "takes too much memory to compile"}

    return answer


if __name__ == "__main__":
    serve(prepare)
