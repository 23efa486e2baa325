"""`python -m server.constraint_worker`: a process that tries to compile constraints, and may be killed for it.

The engine compiles only what was compiled here before: what takes much time or memory, or brings the compiler down,
does it here. Knows constraints; nothing of the server but `server.limited_process`.

A job is a constraint; it is answered by `{}`, or by `{"error"}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hnet_runtime.engine.constraints import ConstraintError, compile_constraint
from hnet_runtime.engine.messages import Constraint
from server.limited_process import serve


def prepare(subject: None) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    def answer(job: Mapping[str, Any]) -> dict[str, str]:
        try:
            compile_constraint(msgspec.convert(job, Constraint))
            return {}
        except ConstraintError as error:
            return {"error": str(error)}
        except MemoryError:
            return {"error": "takes too much memory to compile"}

    return answer


if __name__ == "__main__":
    serve(prepare)
