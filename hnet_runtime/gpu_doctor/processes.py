"""Runs a group in a process of its own, and in another one from where the first one died.

Knows processes and what they say; nothing of GPUs. Leaves no process and no file behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hnet_runtime.gpu_doctor.checks import Finding, Settings
from hnet_runtime.gpu_doctor.worker import SPOILED


def run_group(group: str, settings: Settings, folder: Path) -> Iterator[Finding]:
    """Findings as they come, at most `settings.limit_seconds` long. folder: an empty one for what a process writes.

    A process that dies costs the check it was at, and those after it run in a new one. One that dies before its first
    check, or is too late, ends the group.
    """
    deadline = time.monotonic() + settings.limit_seconds
    done: set[str] = set()
    while True:
        process = _Process(group, settings, done, folder, deadline)
        for finding in process.findings():
            done.add(finding.name)
            yield finding
        if process.finished:
            return
        if process.late:
            what = process.begun or "the group"
            yield Finding(group, what, False, said=f"not done after {settings.limit_seconds:g} s; the rest did not run")
            return
        if process.begun is not None:
            done.add(process.begun)
            yield Finding(group, process.begun, False, said=process.last_words)
        elif process.code != SPOILED:
            yield Finding(group, "the group", False, said=process.last_words)
            return


class _Process:
    """begun: the check that was not ended; finished: whether all were; late: whether it was killed for its time."""

    def __init__(self, group: str, settings: Settings, done: set[str], folder: Path, deadline: float) -> None:
        self.begun: str | None = None
        self.finished = self.late = False
        self.code = 0
        self._deadline = deadline
        self._errors = folder / f"{group}-{len(done)}.txt"
        asked = {"group": group, "settings": dataclasses.asdict(settings), "done": sorted(done)}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hnet_runtime.gpu_doctor.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "TRITON_CACHE_DIR": str(folder / "triton")},
                start_new_session=True,
                text=True,
            )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once, which its code and its last words tell

    def findings(self) -> Iterator[Finding]:
        """As they come, until the process has ended."""
        timer = threading.Timer(max(self._deadline - time.monotonic(), 0.0), self._be_late)
        timer.start()
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                said = json.loads(line)
                if "begun" in said:
                    self.begun = said["begun"]
                elif "found" in said:
                    self.begun = None
                    yield Finding(**said["found"])
                else:
                    self.finished = True
            self.code = self._process.wait()
        finally:
            timer.cancel()
            self._kill()  # what it may have started itself, compilers among it, goes with it
            self._process.wait()
            self._process.stdout.close()

    def _be_late(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    @property
    def last_words(self) -> str:
        """How it died, and the last line that it left."""
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = f"exit code {self.code}"
        if self.code < 0:
            how = f"killed by {signal.Signals(-self.code).name}"
        return f"the process died ({how})" + (f": {lines[-1].strip()[:300]}" if lines else "")
