"""What `pip install .` leaves works without the checkout: the command, the recipes, types."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "launcher",
    "dsv3_megatron",
    "parallel",
    "recipes",
    "dashboards",
)


def run(*words, **options):
    """Run a command; return what it says."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dsv3(tmp_path_factory):
    """The command of a wheel, installed without dependencies: those of this environment serve. Nothing is fetched."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    source, installed = place / "source", place / "installed"
    source.mkdir()
    for name in PARTS:  # a build leaves folders where it is made
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, source)
    run(*pip, "install", "--no-deps", "--no-index", "--target", installed, *place.glob("*.whl"))
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def call(*words):
        folder = place / "empty"
        folder.mkdir(exist_ok=True)
        return run(sys.executable, installed / "bin" / "dsv3", *words, cwd=folder, env=environment)

    call.installed = installed
    return call


@pytest.mark.slow
def test_a_plan_is_made_in_an_empty_folder(dsv3):
    assert "671,026,404,352" in dsv3("plan", "recipe=dsv3_671b", "--fast", "advice=false")


@pytest.mark.slow
def test_the_wheel_holds_recipes_dashboard_and_types(dsv3):
    launcher = dsv3.installed / "launcher"
    for folder in ("recipes", "dashboards"):
        shipped = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.yaml")}
        assert {path.relative_to(launcher / folder) for path in (launcher / folder).rglob("*.yaml")} == shipped
    assert all(
        (dsv3.installed / package / "py.typed").is_file() for package in ("launcher", "dsv3_megatron", "parallel")
    )
    modules = {
        path.relative_to(ROOT) for p in ("launcher", "dsv3_megatron", "parallel") for path in (ROOT / p).rglob("*.py")
    }
    assert {path.relative_to(dsv3.installed) for path in dsv3.installed.rglob("*.py")} == modules


@pytest.mark.slow
def test_what_it_prints_to_type_is_dsv3(dsv3):
    assert "dsv3 train --nproc-per-node N recipe=NAME" in dsv3("train", "--help")
    script = dsv3("submit", "recipe=dsv3_tiny", "cluster=slurm", "cluster.nodes=1", "cluster.gpus_per_node=8",
                  "optim.global_batch=16", "dry_run=true")  # fmt: skip
    assert "-m launcher.pretrain" in script and "PYTHONPATH" not in script and "Written by dsv3 submit" in script
