"""All groups, one after the other: what `hnet doctor --gpu` does. Knows the groups' names and their order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hnet_runtime import __version__
from hnet_runtime.engine.config import EngineError
from hnet_runtime.gpu_doctor.checks import Finding, Settings
from hnet_runtime.gpu_doctor.device import open_device
from hnet_runtime.gpu_doctor.processes import run_group
from hnet_runtime.gpu_doctor.report import passed, write_reports
from hnet_runtime.gpu_doctor.worker import GROUPS


class NoDevice(EngineError):
    """There is nothing to check; the message says why, in a line."""


def examine_gpu(
    settings: Settings,
    folder: Path,
    *,
    groups: Sequence[str] = tuple(GROUPS),
    tell: Callable[[Finding], None] | None = None,
) -> bool:
    """Runs all groups, tells each finding as it comes, and writes the reports to `folder`; True if all passed.

    Raises NoDevice. What is written besides the reports lies in a directory of its own, which is gone afterwards.
    """
    if missing := open_device(settings.device).missing():
        raise NoDevice(missing)
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="hnet-gpu-doctor-") as scratch:
        for group in groups:
            for finding in run_group(group, settings, Path(scratch)):
                findings.append(finding)
                if tell is not None:
                    tell(finding)
            # After each group: one that is interrupted leaves what was found until then.
            write_reports(folder, settings, findings, __version__)
    return passed(findings)
