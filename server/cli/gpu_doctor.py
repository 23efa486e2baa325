"""`hnet doctor --gpu`: a line for each check as it ends, and where the reports are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.streams import write

if TYPE_CHECKING:
    from hnet_runtime.gpu_doctor.checks import Finding


def examine(model: str | None, config: str | None, report: Path, limit_seconds: float) -> int:
    """Checks the GPU; 0 if everything passed, else 1. Raises NoDevice where there is none."""
    from hnet_runtime.checkpoint import locate
    from hnet_runtime.gpu_doctor import device
    from hnet_runtime.gpu_doctor.checks import Settings
    from hnet_runtime.gpu_doctor.examination import examine_gpu

    locate(model, config)  # what is not there is said before anything runs
    settings = Settings(device=device.CUDA, model=model, config=config, limit_seconds=limit_seconds)
    passed = examine_gpu(settings, report, tell=_tell)
    write(f"{'everything passed' if passed else 'something FAILED'}; reports: {report}/gpu-report.md, .json\n")
    return 0 if passed else 1


def _tell(finding: Finding) -> None:
    said = f" ({finding.said})" if finding.said else ""
    write(f"{'ok    ' if finding.passed else 'FAILED'} {finding.group}: {finding.name}{said}\n")
