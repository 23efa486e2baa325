"""A process that runs the checks of one group and says after each what came of it, a line of JSON at a time.

Knows no other group. `python -m hnet_runtime.gpu_doctor.worker` reads what to do from its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from hnet_runtime.gpu_doctor.checks import Check, Finding, Outcome, Settings
from hnet_runtime.gpu_doctor.device import Device, open_device

GROUPS = {
    "device": "hnet_runtime.gpu_doctor.device_group:checks",
    "kernels": "hnet_runtime.gpu_doctor.kernel_group:checks",
    "steps": "hnet_runtime.gpu_doctor.step_group:checks",
    "flips": "hnet_runtime.gpu_doctor.reading_group:flips",
    "crowd": "hnet_runtime.gpu_doctor.reading_group:crowd",
    "overlap": "hnet_runtime.gpu_doctor.overlap_group:checks",
    "rates": "hnet_runtime.gpu_doctor.rate_group:checks",
}
"""What each group is, in the order in which they run."""

SPOILED = 75
"""Exit code of a process whose device fails whatever it is asked after a check: the rest needs a new one."""


def main() -> int:
    """Runs what standard input asks for: {"group": …, "settings": {…}, "done": [names]}."""
    # Libraries print where they like: only lines of ours go where the parent reads.
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.read())
    given = asked["settings"]
    settings = Settings(**{**given, "rows": tuple(given["rows"])})
    device = open_device(settings.device)
    module, _, function = GROUPS[asked["group"]].partition(":")
    checks = getattr(import_module(module), function)
    done = set(asked["done"])
    for check in checks(device, settings):
        if check.name in done:
            continue
        _say(said, {"begun": check.name})
        finding, spoiled = examine(asked["group"], check, device)
        _say(said, {"found": finding.as_dict()})
        if spoiled:
            return SPOILED
    _say(said, {"finished": True})
    return 0


def examine(group: str, check: Check, device: Device) -> tuple[Finding, bool]:
    """What came of a check, and whether the device is of no use after it."""
    began = time.perf_counter()
    outcome = _attempt(check.run)
    spoiled = False
    try:
        device.synchronize()
    except Exception as error:  # noqa: BLE001 an error of the device comes late, and under any name
        spoiled = True
        if outcome.passed:
            outcome = Outcome(False, _told(error))
    seconds = time.perf_counter() - began
    return Finding(group, check.name, outcome.passed, check.demand, outcome.said, seconds, outcome.figures), spoiled


def _attempt(run: Callable[[], Outcome]) -> Outcome:
    try:
        return run()
    except AssertionError as error:
        return Outcome(False, str(error) or "an assertion failed")
    except Exception as error:  # noqa: BLE001 whatever a check fails of is what it found
        return Outcome(False, _told(error))


def _told(error: Exception) -> str:
    """An error in a line: compilers' messages are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines)}"[:600]


def _say(said: IO[str], line: dict[str, Any]) -> None:
    said.write(json.dumps(line) + "\n")
    said.flush()


if __name__ == "__main__":
    sys.exit(main())
