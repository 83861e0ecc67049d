"""Whether Triton's kernels can be used."""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Return whether Triton's kernels can take the tensor: it is on a GPU and nothing else is in the way."""
    return tensor.device.type == "cuda" and why_not() is None


@cache
def why_not() -> str | None:
    """Return what this machine lacks for Triton's kernels besides a GPU, or None where it lacks nothing.

    At its first launch Triton builds a small extension module, so a C compiler and Python's headers must be there.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "there is no C compiler, with which Triton builds its launcher"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are not installed, with which Triton builds its launcher"
    return None
