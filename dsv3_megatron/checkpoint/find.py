"""Which checkpoint: the one that a command means, the one that a run resumes from, and whether its files are whole.

A command asks alone; the ranks of a run ask together, and each checks its share of the files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv3_megatron.checkpoint.changes import changes, read_recipe, refusal, show
from dsv3_megatron.checkpoint.manifest import (
    RECIPE,
    checkpoints,
    folder_name,
    newest_valid,
    problems,
    read_content,
    read_manifest,
)
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from parallel.errors import CheckpointError


@dataclass(frozen=True)
class Chosen:
    """A checkpoint whose files were checked, and what is wrong with newer ones."""

    path: Path
    wrong: tuple[str, ...] = ()


def choose_checkpoint(run: str | Path, step: int | None) -> Chosen:
    """Return the newest valid checkpoint of a run directory, or the one of ``step``.

    Raises: CheckpointError: there is none, or the one named is damaged; the one named is never replaced by another.
    """
    folder = RunDirectory(run).checkpoints
    if step is not None:
        path = folder / folder_name(step)
        if not path.is_dir():
            there = ", ".join(str(int(p.name.split("_")[1])) for p in checkpoints(folder)) or "none"
            raise CheckpointError(f"step = {step}: {path} does not exist; there are: {there}")
        read_manifest(path)
        return Chosen(path)
    newest, wrong = newest_valid(folder)
    if newest is None:
        none = f"{folder} holds no checkpoint; train first, or name another run directory"
        raise CheckpointError(wrong[0].removeprefix("checkpoint: ") if wrong else none)
    return Chosen(newest, tuple(wrong))


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was checked."""

    path: Path
    progress: dict[str, Any]
    extra: tuple[str, ...] = ()
    optimizer: bool = True  # whether it holds the state of a run, or (imported) weights alone

    @classmethod
    def of(cls, path: Path, content: dict[str, Any]) -> Found:
        """Return the checkpoint at ``path``, of whose manifest this is the content."""
        return cls(path, content["progress"], tuple(content["extra"]), content["optimizer"])

    @property
    def recipe(self) -> Path:
        """The resolved recipe it was trained with."""
        return self.path / RECIPE


def find_checkpoint(candidates: list[Path]) -> tuple[Found | None, list[str]]:
    """Return the first candidate whose files are all as written, and what was wrong with those before it.

    All ranks call this together; rank 0's candidates count, and each rank reads its share of the files.
    """
    wrong: list[str] = []
    number = 0
    while True:
        proposal: list[Any] = [None, None, None]  # path, content, what is wrong
        if dist.get_rank() == 0 and number < len(candidates):
            proposal[0] = candidates[number]
            try:
                proposal[1] = read_content(candidates[number])
            except CheckpointError as error:
                proposal[2] = str(error)
        dist.broadcast_object_list(proposal, src=0)
        path, content, failure = proposal
        if path is None:
            return None, wrong
        damage = [failure] if failure else _damage(path, content["files"])
        if not damage:
            return Found.of(path, content), wrong
        wrong.append(damage[0])
        number += 1


def _damage(path: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong with the files, the same on all ranks."""
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    mine = by_size[dist.get_rank() :: dist.get_world_size()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [str(CheckpointError(p)) for p in problems(path, files, mine)])
    return [problem for each in found for problem in each]


def candidates_of(folder: Path, named: str | None) -> list[Path]:
    """Return the checkpoints to try, newest first: those of a run, or, while it has none, the one named."""
    own = checkpoints(folder)
    return own or ([Path(named)] if named else [])


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint, or (None) from the first step."""

    found: Found | None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # key of the recipe -> (then, now)

    @property
    def change(self) -> str:
        """The changes as a person reads them."""
        return "; ".join(f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in self.changed.items())


def choose_start(recipe: Recipe, folder: Path, warn: Callable[[str], None]) -> Start:
    """Return the newest valid checkpoint in ``folder``, or the one the recipe names where there is none.

    ``warn``: told of each damaged one, on rank 0.
    Raises: CheckpointError: all are damaged, or of another model, or ``run.resume`` says otherwise.
    """
    first, mode = dist.get_rank() == 0, recipe.run.resume
    found, wrong = find_checkpoint(candidates_of(folder, recipe.checkpoint.load) if first else [])
    for message in wrong if first else ():
        warn(message)
    if found is None and wrong:
        damage = wrong[0].removeprefix("checkpoint: ").partition(";")[0]
        raise CheckpointError(
            f"{damage}, and no other checkpoint is valid; restore one, or remove the damaged ones ({len(wrong)}) to "
            "begin anew"
        )
    if mode == "required" and found is None:
        raise CheckpointError(f"run.resume = required, but {folder} holds no valid checkpoint; set run.resume=auto")
    if found is None:
        return Start(None)
    changed: list[Any] = [None]
    if first:
        changed = [changes(read_recipe(found.recipe), recipe.model_dump(mode="json"))]
    dist.broadcast_object_list(changed, src=0)
    if refused := refusal(changed[0]):
        raise CheckpointError(f"{found.path} was trained with {refused}; use that value, or name another run.name")
    if mode == "never":
        raise CheckpointError(
            f"run.resume = never, but {found.path} exists; name another run.name, or set run.resume=auto to go on "
            "from it"
        )
    return Start(found, changed[0])
