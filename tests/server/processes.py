"""Processes of servers under test: their children, whether they live, how they ended."""

from __future__ import annotations

from pathlib import Path

from conftest import ServerProcess


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finished(server: ServerProcess) -> tuple[int, str]:
    """Exit code and standard error of a server that is about to end."""
    _, err = server.process.communicate(timeout=20)
    return server.process.returncode, err
