"""What docker/Dockerfile installs can be resolved, for the Python and platform of its image, from the registry that pip
is configured with: uv resolves, as its Python need not be there. Nothing is installed, and no package is fetched but
the sources of two, half a MB.

What it cannot show: that the base image has the tags and Ubuntu packages named, that Transformer Engine's bindings,
Apex and DeepEP compile there, that anything runs."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from testing.clean_root import instructions

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"  # of Ubuntu 24.04
PLATFORM = "x86_64-manylinux_2_39"  # its glibc
BINDINGS = "transformer_engine_torch"  # exists as source alone, whose setup asks torch for its version of CUDA


def pip_lines():
    """Return the words after ``pip install`` of every such command of the file."""
    found = []
    for keyword, rest in instructions((ROOT / "docker" / "Dockerfile").read_text()):
        for command in re.split(r"&&|\|\||;", rest) if keyword == "RUN" else ():
            words = shlex.split(command)
            if "install" in words and "pip" in words[: words.index("install")]:
                found.append(words[words.index("install") + 1 :])
    return found


def parts(lines):
    """Return (requirements, constraints files) of pip lines; the sources that the image clones are none of them."""
    requirements, constraints = [], []
    for words in lines:
        words = iter(words)
        for word in words:
            if word == "-c":
                constraints.append(ROOT / next(words))
            elif word == "-e":
                project = tomllib.loads((ROOT / next(words) / "pyproject.toml").read_text())["project"]
                requirements += project["dependencies"]
            elif not word.startswith(("-", "/tmp/")):
                requirements.append(word)
    return requirements, list(dict.fromkeys(constraints))


def pinned(files):
    """Return package -> version of constraints files."""
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


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
    requirements, constraints = parts(pip_lines())
    pins = pinned(constraints)
    bindings_wheel(pins[normal(BINDINGS)], tmp_path, monkeypatch)
    found = resolved(requirements, constraints, tmp_path)
    loose = sorted(f"{name}=={version}" for name, version in found.items() if pins.get(normal(name)) != version)
    assert not loose, "not pinned:\n" + "\n".join(loose)
    unused = set(pinned([ROOT / "docker" / "constraints-gpu.txt"])) - {normal(name) for name in found}
    assert not unused, f"pinned and not installed: {sorted(unused)}"
    assert {"torch", "transformer-engine-torch", "transformer-engine-cu13", "megatron-core"} <= set(found)
    assert "transformer-engine-cu12" not in found, "of another version of CUDA"


def test_the_pins_of_the_gpu_image_add_to_the_others_and_are_all_of_one_cuda():
    ours, gpu = pinned([ROOT / "constraints.txt"]), pinned([ROOT / "docker" / "constraints-gpu.txt"])
    assert not set(ours) & set(gpu)
    base = next(rest for _, rest in instructions((ROOT / "docker/Dockerfile").read_text()) if "nvidia/cuda:" in rest)
    cuda = re.search(r"nvidia/cuda:(\d+\.\d+)", base)[1]
    assert gpu["nvidia-cuda-runtime"].startswith(f"{cuda}.")
    assert gpu[normal(BINDINGS)] == gpu["transformer-engine"] == gpu["transformer-engine-cu13"]
