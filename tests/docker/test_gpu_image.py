"""What locks/ makes docker/Dockerfile install is what its packages need, for the Python and platform of its image: uv
resolves it from the registry that pip is configured with, as that Python need not be there. Nothing is installed, and
no package is fetched but the sources of two, half a MB.

What it cannot show: that the base image has the Ubuntu packages named, that Transformer Engine's bindings, Apex and
DeepEP compile there, that anything runs."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from testing.clean_root import instructions
from testing.locks import BUILD, ROOT, lock, normal, pinned

CONSTRAINTS = (ROOT / "constraints.txt", ROOT / "docker" / "constraints-gpu.txt")
PYTHON = "3.12"  # of Ubuntu 24.04
PLATFORM = "x86_64-manylinux_2_39"  # its glibc
BINDINGS = "transformer_engine_torch"  # exists as source alone, whose setup asks torch for its version of CUDA


def needed():
    """Return what the image needs, before what that needs in turn: the project, and what it is compiled against."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], "transformer-engine[core-cu13,pytorch]", *BUILD]


def locked(*names):
    """Return package -> version of locks, of what their markers let into the image."""
    requirements = [Requirement(entry.partition("\\")[0]) for name in names for entry in lock(name).values()]
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3"}
    found = [each for each in requirements if each.marker is None or each.marker.evaluate(environment)]
    return {normal(each.name): str(each.specifier).removeprefix("==") for each in found}


def pip(*words):
    return subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)


def pip_setting(name):
    """Return a setting of pip's, by environment or file; empty where there is none."""
    return (
        os.environ.get(f"PIP_{name.upper().replace('-', '_')}") or pip("config", "get", f"global.{name}").stdout.strip()
    )


STAND_IN_TORCH = {  # all that the setup of Transformer Engine's bindings asks of torch before it compiles
    "__init__.py": "from torch import version\n",
    "version.py": "cuda = '13.0'\n",
    "utils/__init__.py": "",
    "utils/cpp_extension.py": "from setuptools import Extension as CppExtension\n"
    "from setuptools.command.build_ext import build_ext as BuildExtension\n",
}


def bindings_wheel(version, folder, monkeypatch):
    """Write a wheel without content that requires what the sources of Transformer Engine's bindings require."""
    for file, text in STAND_IN_TORCH.items():
        (folder / "stand_in" / "torch" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stand_in" / "torch" / file).write_text(text)
    words = ("--no-deps", "--no-build-isolation", "--no-binary=:all:", "-d", str(folder), f"{BINDINGS}=={version}")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "stand_in"))
        done = pip("download", "--quiet", *words)
    if "(from versions: none)" in done.stderr:
        pytest.skip(f"the registry that pip is configured with does not answer, or has no {BINDINGS}")
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sources:
        info = next(file for file in sources.getnames() if file.endswith("egg-info/PKG-INFO"))
        metadata = sources.extractfile(info).read().decode()
    with zipfile.ZipFile(folder / f"{BINDINGS}-{version}-py3-none-any.whl", "w") as wheel:
        place = f"{BINDINGS}-{version}.dist-info"
        wheel.writestr(f"{place}/METADATA", metadata)
        wheel.writestr(f"{place}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{place}/RECORD", "")


def resolved(requirements, constraints, folder):
    """Return package -> version of what an installation in the image would bring, or the reason why there is none."""
    (folder / "requirements.txt").write_text("\n".join(requirements))
    words = [f"--python-version={PYTHON}", f"--python-platform={PLATFORM}", f"--find-links={folder}", "--no-annotate"]
    words += [word for file in constraints for word in ("--constraints", str(file))]
    words += ["--index-strategy=unsafe-best-match"]  # the best of all indexes, as pip does
    words += [f"--default-index={url}" for url in pip_setting("index-url").split()]
    words += [f"--index={url}" for url in pip_setting("extra-index-url").split()]
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", "--no-header", *words]
    environment = {"SSL_CERT_FILE": pip_setting("cert"), **os.environ} if pip_setting("cert") else os.environ
    done = subprocess.run([*command, folder / "requirements.txt"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split("==") for line in done.stdout.split())


@pytest.mark.slow
@pytest.mark.full
def test_the_gpu_image_resolves_to_what_is_pinned(tmp_path, monkeypatch):
    pins = pinned(CONSTRAINTS)
    bindings_wheel(pins[normal(BINDINGS)], tmp_path, monkeypatch)
    found = {normal(name): version for name, version in resolved(needed(), CONSTRAINTS, tmp_path).items()}
    assert found == locked("build", "runtime", "torch", "cuda", "gpu", "gpu_bindings")
    unused = set(pinned(CONSTRAINTS[1:])) - set(found)
    assert not unused, f"pinned and not installed: {sorted(unused)}"
    assert {"torch", "transformer-engine-torch", "transformer-engine-cu13", "megatron-core"} <= set(found)
    assert "transformer-engine-cu12" not in found, "of another version of CUDA"


def test_the_pins_of_the_gpu_image_add_to_the_others_and_are_all_of_one_cuda():
    ours, gpu = pinned(CONSTRAINTS[:1]), pinned(CONSTRAINTS[1:])
    assert not set(ours) & set(gpu)
    base = next(rest for _, rest in instructions((ROOT / "docker/Dockerfile").read_text()) if "nvidia/cuda:" in rest)
    cuda = re.search(r"nvidia/cuda:(\d+\.\d+)", base)[1]
    assert gpu["nvidia-cuda-runtime"].startswith(f"{cuda}.")
    assert gpu[normal(BINDINGS)] == gpu["transformer-engine"] == gpu["transformer-engine-cu13"]
