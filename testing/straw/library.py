"""device.cpp, compiled once for the torch installed and loaded before torch asks for a CUDA library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "straw"
DEVICES = 8  # as in device.cpp


class NoCompilerError(Exception):
    """This machine has no C++ compiler."""


def load() -> ctypes.CDLL:
    """Return the library, compiled if need be. Call before ``import torch``. Raises NoCompilerError."""
    torch = Path(util.find_spec("torch").origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + f"{metadata.version('torch')} {torch}".encode()).hexdigest()[:16]
    path = CACHE / f"device-{key}.so"
    if not path.exists():
        _compile(path, torch)
    return ctypes.CDLL(str(path))


def _compile(path: Path, torch: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler here; install with: apt-get install g++")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(f".{os.getpid()}")  # several may compile at once
    how = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}"]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run([compiler, *how, str(SOURCE), "-o", str(made), *libraries], check=True)
    made.replace(path)
