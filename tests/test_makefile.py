"""make deletes nothing that was trained."""

import shutil
import subprocess
from pathlib import Path

import pytest

from testing.clean_root import instructions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    """What docker/Dockerfile.cpu copies, everything installed, by stand-ins, and something trained."""
    for keyword, rest in instructions((ROOT / "docker" / "Dockerfile.cpu").read_text()):
        for name in rest.split()[1:-1] if keyword == "COPY" else ():
            if (ROOT / name).is_file():
                (tmp_path / name).parent.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "dsv3"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    for run in ("demo", "mine"):
        checkpoint = tmp_path / "runs" / run / "checkpoints" / "step_00000100" / "weights"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text(run)
    return tmp_path


def make(folder, target):
    """Return what make prints."""
    return subprocess.run(["make", target], cwd=folder, check=True, capture_output=True, text=True).stdout


def trained(folder):
    """Return the content of every checkpoint there is."""
    return sorted(file.read_text() for file in folder.glob("runs/*/checkpoints/*/weights"))


def test_clean_keeps_what_was_trained_and_says_so(folder):
    said = make(folder, "clean")
    assert not (folder / ".venv").exists()
    assert trained(folder) == ["demo", "mine"]
    assert "runs/ is kept" in said


def test_a_demo_keeps_the_demo_of_before(folder):
    said = make(folder, "demo")
    assert not (folder / "runs" / "demo").exists()  # dsv3 is a stand-in: nothing was trained anew
    assert trained(folder) == ["demo", "mine"]
    kept = next(folder.glob("runs/demo-*")).name
    assert f"demo: starts anew; runs/demo is now runs/{kept}" in said
    assert "dsv3 train --nproc-per-node 4" in said
