"""Commands that are printed work as pasted, whether or not the environment is active in the user's shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.run.shell import program
from launcher.command_line.typed import script
from launcher.demo import next_commands

ROOT = Path(__file__).resolve().parents[2]
BARE = "/usr/local/bin:/usr/bin:/bin"


def answer(command):
    """Run a command in a shell in which the environment is not active; return all that it says."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_what_the_demo_prints_runs_with_a_bare_path(monkeypatch):
    monkeypatch.setenv("PATH", BARE)
    monkeypatch.chdir(ROOT)
    generate, evaluate, torchrun, pretrain = next_commands("runs/demo")
    assert "Keys" in answer(f"{generate} --help")
    assert "Keys" in answer(f"{evaluate} --help")
    assert "layout: parallel.expert = 3" in answer(torchrun.replace("expert=2", "expert=3"))  # before anything starts
    assert "Train a recipe" in answer(pretrain)
    monkeypatch.chdir(ROOT / "docs")
    assert "Keys" in answer(f"{next_commands('runs/demo')[0]} --help")


def test_a_name_on_path_stays_bare(monkeypatch):
    folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"{folder}:{BARE}")
    assert program("python") == "python"
    monkeypatch.setenv("PATH", BARE)
    monkeypatch.chdir(ROOT)
    assert program("python") != "python" and Path(program("torchrun")).name == "torchrun"
    assert script("launcher/plan.py") == "launcher/plan.py"
    monkeypatch.chdir("/")
    assert script("launcher/plan.py") in (str(ROOT / "launcher/plan.py"), str(ROOT / "launcher/plan.py").lstrip("/"))
