"""Which native library serves: the best one that is built and that this processor runs, or the one asked for.

Knows files, processor flags and the environment; not what the library computes.

HNET_NATIVE          unset or `auto`: the best one; `amx`, `avx512`, `avx2` or `portable`: exactly that one; `off`:
                     none, so that the torch path serves.
HNET_NATIVE_LIBRARY  for developers: the path of one library, which then serves whatever else is built (`make sanitize`
                     runs the kernels' tests so). HNET_NATIVE=off goes before it.
"""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hnet_runtime.ops.native import binding, build
from hnet_runtime.ops.native.binding import NativeError
from hnet_runtime.ops.native.build import Isa

CHOICE, OVERRIDE = "HNET_NATIVE", "HNET_NATIVE_LIBRARY"
REFUSED = "the system refuses this process the registers that it needs"
HOW_TO_BUILD = "build them with `make native` or `python -m hnet_runtime.ops.native.build`"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeLibrary:
    """A loaded library. calls: its C functions, typed as in binding.py."""

    isa: str
    path: Path
    calls: Any


class Candidate(NamedTuple):
    """What is known of one instruction set's library before it is loaded.

    path: None where it is not built. runnable: built, and this processor has what it needs. reason: why not, or what
    is worth knowing of one that is.
    """

    isa: str
    path: Path | None
    runnable: bool
    reason: str


def open_library() -> NativeLibrary | None:
    """The library to serve with; None where HNET_NATIVE is `off`, and, with one warning a process, where none is built.

    Raises NativeError if what the environment asks for cannot be had, or if a library does not load.
    """
    choice = os.environ.get(CHOICE, "").strip().lower() or "auto"
    names = [isa.name for isa in build.ISAS]
    if choice not in ("auto", "off", *names):
        raise NativeError(f"{CHOICE}={choice}: must be auto, {', '.join(names)} or off")
    if choice == "off":
        return None
    known = candidates()
    if os.environ.get(OVERRIDE):
        return _open_asked(f"{OVERRIDE}={known[0].path}", known[0])
    if choice != "auto":
        (asked,) = (candidate for candidate in known if candidate.isa == choice)
        return _open_asked(f"{CHOICE}={choice}", asked)
    for candidate in known:
        if candidate.runnable:
            opened = _open(candidate)
            if opened.calls.hnet_usable():
                return opened
            _warn_once(f"{candidate.path}: {REFUSED}")
    _warn_once(f"native kernels are not built, so the slower torch path serves; {HOW_TO_BUILD}")
    return None


def available() -> list[Candidate]:
    """What is known of each instruction set, best first; one that HNET_NATIVE_LIBRARY names shuts out the others."""
    return [_tried(candidate) for candidate in candidates()]


def candidates() -> list[Candidate]:
    """The same by files and processor flags alone, without loading a library."""
    named = os.environ.get(OVERRIDE)
    if not named:
        return [_candidate(isa) for isa in build.ISAS]
    path = Path(named)
    isa = next((isa for isa in build.ISAS if isa.file_name == path.name), None)
    why_not = _missing_flags(isa) if isa else ""
    if not path.is_file():
        why_not = "no such file"
    return [
        Candidate(isa.name if isa else path.stem, path, not why_not, why_not or f"{OVERRIDE} names it"),
        *(Candidate(other.name, None, False, f"{OVERRIDE} is set") for other in build.ISAS if other is not isa),
    ]


def _candidate(isa: Isa) -> Candidate:
    path = build.LIBRARIES / isa.file_name
    if isa not in build.isas_of(platform.machine()):
        return Candidate(isa.name, None, False, f"not for a {platform.machine()} processor")
    missing = _missing_flags(isa)
    if not path.exists():
        return Candidate(isa.name, None, False, "not built" + (f", and {missing}" if missing else ""))
    if missing:
        return Candidate(isa.name, path, False, missing)
    stale = "" if build.is_current(isa, path) else "older than its sources; build it again with `make native`"
    return Candidate(isa.name, path, True, stale)


def _tried(candidate: Candidate) -> Candidate:
    """The same, runnable only if it loads."""
    if not candidate.runnable or candidate.path is None:
        return candidate
    try:
        usable = binding.load(candidate.path).hnet_usable()
    except NativeError as error:
        return candidate._replace(runnable=False, reason=str(error))
    return candidate if usable else candidate._replace(runnable=False, reason=REFUSED)


def _open(candidate: Candidate) -> NativeLibrary:
    assert candidate.path is not None
    if candidate.reason:
        _warn_once(f"{candidate.path}: {candidate.reason}")
    try:
        return NativeLibrary(candidate.isa, candidate.path, binding.load(candidate.path))
    except NativeError as error:
        raise NativeError(f"{error} ({CHOICE}=off serves without native kernels)") from error


def _open_asked(asked_by: str, candidate: Candidate) -> NativeLibrary:
    if not candidate.runnable:
        raise NativeError(f"{asked_by}: {candidate.reason}")
    opened = _open(candidate)
    if not opened.calls.hnet_usable():
        raise NativeError(f"{asked_by}: {REFUSED}")
    return opened


def _missing_flags(isa: Isa) -> str:
    missing = sorted(isa.cpu_flags - _cpu_flags())
    return f"this processor lacks {', '.join(missing)}" if missing else ""


@cache
def _cpu_flags() -> frozenset[str]:
    """As Linux lists them. Elsewhere none, which leaves the portable library."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
