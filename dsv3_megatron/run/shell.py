"""How a program of this environment is typed in the user's shell: printed commands work as pasted."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program(name: str) -> str:
    """Return the bare name where PATH leads to this environment's ``name`` (python, torchrun, wandb), else its path."""
    folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found and Path(found).parent.resolve() == folder.resolve():
        return name
    return typed_path(Path(sys.executable) if name == "python" else folder / name)


def typed_path(path: Path) -> str:
    """Return how a path is typed in the current directory: short where it lies below, quoted where it must be."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
