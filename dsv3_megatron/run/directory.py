"""The files of a run: recipe.yaml, environment.json, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from dsv3_megatron.run.files import read_json_lines
from dsv3_megatron.run.made import new_file
from parallel.errors import RecipeError

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "hydra-core", "wandb", "tokenizers", "numpy")


class RunDirectory:
    """Where a run keeps what it writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """What one needs to repeat the run: versions, commit, host, world."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of complete checkpoints."""
        return self.path / "checkpoints"

    @property
    def memory(self) -> Path:
        """Which states of the run that hosts keep in memory are of its last life."""
        return self.path / "memory.json"

    @property
    def published_scales(self) -> Path:
        """The scales of the FP8 weights that the run was imported from, if it was."""
        return self.path / "published_scales.safetensors"

    @property
    def events(self) -> Path:
        """One JSON object for each thing that is no step: started, resumed, saved, save_failed."""
        return self.path / "events.jsonl"

    def excluded(self, sha256: str) -> Path:
        """What of the data some starts of the run left out (data.exclude); events.jsonl says which starts."""
        return self.path / f"excluded_{sha256[:8]}.jsonl"

    @property
    def finished(self) -> Path:
        """There once the run has consumed its steps or tokens: a scheduler that sees it need not start it again."""
        return self.path / "finished"

    @property
    def summary(self) -> Path:
        """What the run ended with."""
        return self.path / "summary.json"

    @property
    def refused(self) -> Path:
        """One line; there when starting the same recipe again cannot help. Batch jobs read it."""
        return self.path / "refused"

    @property
    def report(self) -> Path:
        """What the run did, for a browser."""
        return self.path / "report.html"

    @property
    def schedule(self) -> Path:
        """Drawing of a step's pipeline schedule."""
        return self.path / "schedule.svg"

    @property
    def expert_load(self) -> Path:
        """Tokens of every expert, one JSON object for each step at which they were kept."""
        return self.path / "expert_load.jsonl"

    def forget_end(self) -> None:
        """Take back that the run has ended: it is started anew on purpose."""
        for path in (self.finished, self.refused, self.path / "starts"):
            path.unlink(missing_ok=True)

    def create(self) -> None:
        """Make the folders.

        Raises RecipeError when the place cannot be written, or holds what is no run: a run replaces files by their
        names, and drops from metrics.jsonl what it takes for steps that are done again.
        """
        with self._writing():
            self._refuse_others()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._try_to_write()

    def leave_mark(self, token: str) -> None:
        """Leave a file by which another host knows this very folder. Raises RecipeError: it cannot be written."""
        with self._writing():
            new_file(self._mark(token)).close()

    def check_mark(self, token: str) -> None:
        """Raise RecipeError where this host does not see the folder that holds the mark, or cannot write there."""
        if not self._mark(token).exists():
            raise RecipeError(
                f"run.directory = {self.path} is not the folder that rank 0 has made; name one that all hosts share"
            )
        with self._writing():
            self._try_to_write()

    def remove_mark(self, token: str) -> None:
        """Remove it again."""
        self._mark(token).unlink(missing_ok=True)

    def _refuse_others(self) -> None:
        is_run = self.recipe.exists() or self.checkpoints.is_dir()  # a run has one of them from its first second on
        own = (self.metrics, self.events, self.summary, self.report, self.schedule, self.expert_load, self.environment)
        others = [] if is_run else [path for path in (*own, self.path / "tokenizer.json") if path.is_file()]
        if (index := self.path / "model.safetensors.index.json").is_file():
            others.append(index)
        if others:
            raise RecipeError(
                f"run.directory = {self.path} holds {others[0].name} of something that is no run; name a new directory"
            )

    def _mark(self, token: str) -> Path:
        return self.path / f".made-{token}"

    def _try_to_write(self) -> None:
        probe = self.path / f".writable-{platform.node()}-{os.getpid()}"  # hosts look at the same time
        new_file(probe).close()
        probe.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecipeError(
                f"run.directory = {self.path} cannot be written ({error.strerror}); name another directory"
            ) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the steps written so far."""
        return read_json_lines(self.metrics)


def package_versions() -> dict[str, str | None]:
    """Return the versions of what this project stands on; None of what is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def environment(world: dict[str, Any]) -> dict[str, Any]:
    """Return versions, git commit, host and world: what one needs to repeat a run."""
    # Installed into an environment that lies in a repository of the user's, this is no file of that repository.
    ours = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "git_commit": _git("rev-parse", "HEAD") if ours else None,
        "git_changed": bool(ours and _git("status", "--porcelain", "--untracked-files=no")),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "world": world,
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git: nothing to record
    return done.stdout.strip()
