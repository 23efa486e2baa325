"""`python requirements.py [EXTRA…]`: what the pyproject.toml of this folder asks for, a line each.

So that an image can install dependencies in a layer that a change of code leaves alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The dependencies and those of the extras. Raises KeyError for an extra that is not there."""
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    pyproject = tomllib.loads((Path.cwd() / "pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(requirements(pyproject["project"], sys.argv[1:])))
