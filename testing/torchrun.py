"""Starts ranks as a user does, and returns what the terminal shows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from testing.ports import free_port

ROOT = Path(__file__).resolve().parents[1]


def torchrun(
    ranks: int,
    *words: object,
    flags: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> tuple[list[str], int]:
    """Run ranks on this host; return the lines of the terminal and torchrun's exit code.

    ``variables``: of the environment, beside this process's own. ``folder``: to start in.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *flags]
    command += ["--master-port", str(free_port()), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
    return (done.stdout + done.stderr).splitlines(), done.returncode
