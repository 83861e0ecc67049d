"""Writes locks/: what environments and images install, each file of a package by its SHA-256 (`make locks`).

constraints.txt and docker/constraints-gpu.txt choose the versions, pyproject.toml what is needed, uv resolves it for
every Python and Linux, from PyPI's index alone. pip takes a lock with --require-hashes and --no-deps: a package of
another content is refused, wherever it comes from, and nothing is fetched that the lock does not name.

    build.txt         what builds packages that exist as source alone (with --no-build-isolation)
    runtime.txt       what the package needs beside torch
    torch_cpu.txt     torch for CPUs, where pip finds that build: not on PyPI, but on PyTorch's index
    torch.txt         torch as PyPI has it, for CUDA on Linux; cuda.txt: what that needs
    dev.txt           what tests and lint need beside all that
    gpu.txt           what Transformer Engine needs beside all that; gpu_bindings.txt: what is compiled against it
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
BUILD = ("setuptools", "wheel", "ninja", "packaging")
BINDINGS = "transformer-engine-torch"  # exists as source alone, whose metadata is known where torch is installed
# PyTorch's index of CPU builds is another than PyPI: its SHA-256 of the Linux wheels of 2.13.0+cpu.
TORCH_CPU = {
    "cp311-x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "cp311-aarch64": "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    "cp312-x86_64": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "cp312-aarch64": "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
    "cp313-x86_64": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
    "cp313-aarch64": "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    "cp314-x86_64": "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691",
    "cp314-aarch64": "ca021f9eb2f8345c83fa03e3a04587308afb8df71bd472670b3ece00df58621c",
}

Lock = dict[str, str]  # package, as PyPI spells it -> its lines: version, marker, hashes


def main() -> None:
    """Write all locks."""
    LOCKS.mkdir(exist_ok=True)
    for name, lock in made().items():
        (LOCKS / f"{name}.txt").write_text("".join(f"{lock[package]}\n" for package in sorted(lock)))


def made() -> dict[str, Lock]:
    """Return the content of every lock."""
    files = (ROOT / "constraints.txt", ROOT / "docker" / "constraints-gpu.txt")
    pins, gpu = pinned(files), pinned(files[1:])
    build = resolved([f"{name}=={pins[name]}" for name in BUILD])
    runtime = resolved([ROOT / "pyproject.toml"], files)
    dev = resolved([ROOT / "pyproject.toml", "--extra=dev", "--extra=lint"], files)
    cuda = {name: lines for name, lines in runtime.items() if re.match(r"(nvidia|cuda)-|triton$", name)}
    hashes = "".join(f" \\\n    --hash=sha256:{digest}" for digest in TORCH_CPU.values())
    beyond = [f"{name}=={version}" for name, version in gpu.items() if name not in {*runtime, *build, BINDINGS}]
    return {
        "build": build,
        "runtime": {name: lines for name, lines in runtime.items() if name not in {*cuda, "torch"}},
        "torch": {"torch": runtime["torch"]},
        "torch_cpu": {"torch": f"torch=={pins['torch']}+cpu{hashes}"},
        "dev": {name: lines for name, lines in dev.items() if name not in runtime},
        "cuda": cuda,
        "gpu": resolved(beyond),
        "gpu_bindings": resolved([f"{BINDINGS}=={gpu[BINDINGS]}"]),
    }


def resolved(needed: Sequence[str | Path], constraints: Sequence[Path] = ()) -> Lock:
    """Return the lock of what a project and its extras need, for every Python from 3.11 on and every platform.

    Without ``constraints``: of the versions given, and of nothing that they need.
    """
    words = ["--universal", "--python-version=3.11", "--generate-hashes", "--no-annotate", "--no-header", "--no-config"]
    words += [word for file in constraints for word in ("--constraints", str(file))]
    words += ["--default-index=https://pypi.org/simple", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        given = [str(word) for word in needed]
        if not constraints:
            (Path(folder) / "given.txt").write_text("\n".join(given))
            given = [f"{folder}/given.txt", "--no-deps"]
        command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", *given, *words]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return entries(done.stdout)


def lock(name: str) -> Lock:
    """Return a lock as it is in the repository."""
    return entries((LOCKS / f"{name}.txt").read_text())


def entries(text: str) -> Lock:
    """Return the entries of a lock: each package's lines, without the last newline."""
    found = re.split(r"\n(?=\S)", text.strip())
    return {normal(entry.partition("==")[0]): entry for entry in found if entry}


def pinned(files: Sequence[Path]) -> dict[str, str]:
    """Return package -> version of constraints files."""
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def normal(name: str) -> str:
    """Return a package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
