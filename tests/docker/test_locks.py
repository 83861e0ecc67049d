"""Nothing is installed that is not named by its content: packages by SHA-256, images by digest, sources by commit."""

import re
import tomllib
from importlib import metadata

import pytest

from testing.clean_root import instructions
from testing.licences import licence
from testing.locks import LOCKS, ROOT, lock, normal, pinned

NAMES = sorted(path.stem for path in LOCKS.glob("*.txt"))
DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"]
PINS = pinned([ROOT / "constraints.txt", ROOT / "docker" / "constraints-gpu.txt"])
ELSEWHERE = {"colorama", "httpx2-jsfetch"}  # for other systems, which nobody has installed here to pin them


def version_of(entry):
    return re.match(r"\S+==(\S+)", entry)[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_package_of_a_lock_has_a_version_of_the_constraints_and_hashes(name):
    for package, entry in lock(name).items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), package
        if package not in ELSEWHERE:
            assert version_of(entry).removesuffix("+cpu") == PINS[package], package


def test_this_environment_is_what_the_locks_say():
    for name in ("build", "runtime", "torch_cpu", "dev"):
        for package, entry in lock(name).items():
            if " ; " in entry.partition("\\")[0]:
                continue  # for some systems and Pythons only
            if package in ("ninja", "wheel"):
                continue  # in the environment's first installation alone
            assert metadata.version(package).removesuffix("+cpu") == version_of(entry).removesuffix("+cpu"), package


def test_the_locks_hold_what_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for needed, names in (
        (project["dependencies"], ("runtime", "torch")),
        ([*extras["dev"], *extras["lint"]], ("runtime", "dev")),
        (extras["gpu"], ("gpu",)),
    ):
        held = {package for name in names for package in lock(name)}
        assert {normal(re.match(r"[\w.-]+", text)[0]) for text in needed} <= held


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_by_hash_or_what_was_cloned_by_commit(path):
    text = path.read_text()
    calls = [
        command.split()
        for keyword, rest in instructions(text)
        if keyword == "RUN"
        for command in re.split(r"&&|\|\||[;{}]", rest)
        if re.search(r"\bpip install\b", command)
    ]
    assert len(calls) >= 4
    for words in calls:
        by_hash = "--require-hashes" in words and all(
            words[place + 1].startswith("locks/") for place, word in enumerate(words) if word == "-r"
        )
        ours_or_cloned = words[-1] == "." or words[-1].startswith("/tmp/")
        assert "--no-deps" in words and (by_hash or ours_or_cloned), words
    bases = re.findall(r"^(?:FROM|ARG BASE=)\s*(\S+)", text, re.M)
    assert all("@sha256:" in base or base == "${BASE}" for base in bases), bases
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in re.findall(r"_COMMIT=(\w\S*)", text))


def test_make_installs_by_hash_alone():
    text = (ROOT / "Makefile").read_text()
    env = text.partition("$(STAMP): pyproject.toml")[2].partition("# Two pipeline stages")[0]
    assert "LOCKED = $(PIP) install --require-hashes --no-deps" in text
    assert "--require-hashes" in re.search(r"^BESIDE = .*", text, re.M)[0]
    assert re.findall(r"\$\(PIP\) install .*", env) == ["$(PIP) install --no-deps --no-build-isolation -e ."]
    for name in ("te", "triton"):
        assert "--hash=sha256:" in (ROOT / "testing" / name / "requirements.txt").read_text()


def test_what_only_reads_the_repository_is_in_no_image():
    inside = {package for name in ("build", "runtime", "torch", "torch_cpu", "cuda", "gpu") for package in lock(name)}
    assert not inside & {"tally-cli", "ruff", "mypy", "pytest", "hypothesis", "types-pyyaml"}
    for path in DOCKERFILES:
        assert "dev.txt" not in path.read_text() and "[dev]" not in path.read_text()


def test_the_licence_of_every_package_is_listed():
    page = (ROOT / "docs" / "licences.md").read_text()
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.+?) \|", page, re.M))
    for name in ("runtime", "torch", "dev"):
        for package in lock(name):
            if licence(package) is not None:
                assert listed[package] == licence(package) != "see its files", package
    copyleft = {package for package, stated in listed.items() if "GPL" in stated}
    assert copyleft == {"tally-cli"} and not copyleft & set(lock("runtime"))
