"""What was found, as one JSON document and one page of Markdown. Knows findings; no device."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hnet_runtime.gpu_doctor.checks import Finding, Settings

_TITLES = {
    "device": "Device",
    "kernels": "Kernels beside their twins",
    "steps": "Captured steps beside eager ones",
    "flips": "Boundaries: CPU in float32 against the device",
    "crowd": "Rows alone and in a crowd",
    "overlap": "Steps launched ahead beside steps that are not",
    "rates": "Bytes a second",
}


def write_reports(folder: Path, settings: Settings, findings: Sequence[Finding], version: str) -> tuple[Path, Path]:
    """gpu-report.json and gpu-report.md in `folder`, in place of older ones, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    page, document = folder / "gpu-report.md", folder / "gpu-report.json"
    _write(document, json.dumps(as_document(settings, findings, version), indent=2) + "\n")
    _write(page, as_markdown(settings, findings, version))
    return document, page


def as_document(settings: Settings, findings: Sequence[Finding], version: str) -> dict[str, Any]:
    """Everything, in what JSON can hold."""
    found: dict[str, Any] = _finite(
        {
            "hnet": version,
            "passed": passed(findings),
            "model": settings.model or "demo",
            "text_bytes": settings.text_bytes,
            "findings": [finding.as_dict() for finding in findings],
        }
    )
    return found


def passed(findings: Sequence[Finding]) -> bool:
    """Whether there is something, and all of it is right."""
    return bool(findings) and all(finding.passed for finding in findings)


def as_markdown(settings: Settings, findings: Sequence[Finding], version: str) -> str:
    """Failures first, then a table for each group."""
    failed = [finding for finding in findings if not finding.passed]
    device = next((each.figures.get("device") for each in findings if "device" in each.figures), "unknown device")
    lines = [
        f"# hnet doctor --gpu: {device}",
        "",
        f"hnet {version}, model {settings.model or 'demo'}: of {len(findings)} checks {len(failed)} failed.",
        f"**The runtime is {'right' if passed(findings) else 'NOT right'} on this device.**",
    ]
    if failed:
        lines += ["", "## Failed", "", "| check | demanded | found |", "|---|---|---|"]
        lines += [
            f"| {_cell(f'{each.group}: {each.name}')} | {_cell(each.demand)} | {_cell(each.said)} |" for each in failed
        ]
    for group, title in _TITLES.items():
        own = [finding for finding in findings if finding.group == group]
        if own:
            lines += ["", f"## {title}", ""]
            lines += _rates(own) if group == "rates" else _figures(own) if group == "device" else _table(own)
    return "\n".join(lines) + "\n"


def _table(findings: Sequence[Finding]) -> list[str]:
    lines = ["| check | | found | demanded | s |", "|---|---|---|---|---|"]
    return lines + [
        f"| {_cell(each.name)} | {'ok' if each.passed else 'FAILED'} | {_cell(each.said)} | {_cell(each.demand)} "
        f"| {each.seconds:.2f} |"
        for each in findings
    ]


def _figures(findings: Sequence[Finding]) -> list[str]:
    """What the device is: a line for each thing that is known of it."""
    lines = ["| | |", "|---|---|"]
    for finding in findings:
        told = {key: value for key, value in finding.figures.items() if finding.name != "memory bandwidth"}
        for name, value in (told or {finding.name: finding.said}).items():
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            lines += [f"| {_cell(f'{name} {key}'.strip())} | {_cell(str(each))} |" for key, each in pairs]
    return lines


def _rates(findings: Sequence[Finding]) -> list[str]:
    lines = ["| | rows | bytes/s | expected at most | share | first byte, ms |", "|---|---|---|---|---|---|"]
    other = []
    for each in findings:
        rate = each.figures.get("bytes_per_second")
        if rate is None:
            other += ["", f"{each.name}: {each.said}."]
            continue
        expected, first = each.figures["expected_bytes_per_second"], each.figures["first_byte_seconds"]
        share = f"{expected:.0f} | {rate / expected:.1%}" if expected else "no expectation | "
        told = f"{1e3 * first:.1f}" if first is not None else ""
        lines.append(f"| {each.figures['policy']} | {each.figures['rows']} | {rate:.0f} | {share} | {told} |")
    return lines + other


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a figure is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(path)
