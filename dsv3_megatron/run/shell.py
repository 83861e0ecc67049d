"""How a program or script of this environment is typed in the user's shell: printed commands work as pasted."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> str:
    """Return the bare name where PATH leads to this environment's ``name`` (python, torchrun, wandb), else its path."""
    folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found and Path(found).parent.resolve() == folder.resolve():
        return name
    return _short(Path(sys.executable) if name == "python" else folder / name)


def script(name: str) -> str:
    """Return how a script of the repository (``launcher/plan.py``) is named from the current directory."""
    return _short(_ROOT / name)


def _short(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
