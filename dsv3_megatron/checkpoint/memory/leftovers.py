"""What other runs of this user have left in a host's memory: removed once they are over, told of while they are not."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dsv3_megatron.checkpoint.memory.folder import OWNER, top_folder
from dsv3_megatron.checkpoint.memory.lives import read_lives
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.exclusive import STALE_SECONDS, age_seconds
from dsv3_megatron.run.files import read_json
from parallel.errors import CheckpointError
from parallel.units import show_bytes


class Left(NamedTuple):
    """What a host holds of a run that does not train now.

    Attributes:
        directory: of that run.
        is_removed: whether it was freed: the run is over, or was begun anew.
    """

    path: str
    directory: str
    bytes: int
    is_removed: bool


def clear_leftovers(root: Path, run: str) -> list[Left]:
    """Remove from memory what runs have left that are over; return that, and what others have left that may still
    resume. A run that trains now is no leftover. Called by one rank of a host.

    Args:
        root: as the recipe has it (``checkpoint.memory_path``).
        run: the id of the run that asks, of which nothing is touched.
    """
    return list(_clear(root, run))


def _clear(root: Path, run: str) -> Iterator[Left]:
    for folder in sorted(top_folder(root).glob("*")):
        if folder.name == run or not folder.is_dir():
            continue
        owners = (read_json(owner).get("directory") for owner in sorted(folder.glob(f"*/{OWNER}")))
        directory = next((owner for owner in owners if isinstance(owner, str)), None)
        if directory is None:
            continue  # another process makes it just now
        if _trains(Path(directory)):
            continue
        is_over, size = _is_over(RunDirectory(directory), folder.name), _size(folder)
        if is_over:
            shutil.rmtree(folder, ignore_errors=True)
        yield Left(str(folder), directory, size, is_over)


def _is_over(directory: RunDirectory, run: str) -> bool:
    """Return whether no start of the run can read its memory any more. Not so where its directory is not seen here."""
    if not directory.path.is_dir():
        return False
    try:
        return directory.finished.exists() or read_lives(directory.memory).run != run
    except CheckpointError:
        return False


def _trains(directory: Path) -> bool:
    """Return whether somebody holds the run directory."""
    lock = directory / "lock"
    return lock.exists() and age_seconds(lock) < STALE_SECONDS


def _size(folder: Path) -> int:
    """Return the bytes of all files; one that another process removes meanwhile has none."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            size += file.stat().st_size if file.is_file() else 0
    return size


def describe_leftovers(found: Iterable[Left]) -> list[str]:
    """Return what a person should know of what all hosts hold of other runs: a line a run."""
    by_run: dict[tuple[str, bool], list[Left]] = {}
    for each in found:
        by_run.setdefault((each.directory, each.is_removed), []).append(each)
    lines = []
    for (directory, is_removed), places in sorted(by_run.items()):
        where = places[0].path + (f" and on {len(places) - 1:,} more nodes" if len(places) > 1 else "")
        size = show_bytes(sum(place.bytes for place in places))
        if is_removed:
            lines.append(f"freed {size} of memory that the run in {directory} had left: {where}")
        else:
            lines.append(
                f"warning: {size} of memory are held for the run in {directory}, which is not over and does not train; "
                f"start it again, or remove {where}"
            )
    return lines
