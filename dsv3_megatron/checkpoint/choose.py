"""Which checkpoint of a run a command means: the newest valid one, or the one named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.checkpoint.manifest import checkpoints, folder_name, newest_valid, read_manifest
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
    path, wrong = newest_valid(folder)
    if path is None:
        none = f"{folder} holds no checkpoint; train first, or name another run directory"
        raise CheckpointError(wrong[0].removeprefix("checkpoint: ") if wrong else none)
    return Chosen(path, tuple(wrong))
