"""One job at a time in a run directory: two trainers would overwrite each other's checkpoints and metrics."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dsv3_megatron.run.exclusive import STALE_SECONDS, age_seconds, beating, discard, is_alive, me, take
from parallel.errors import RunInUseError
from parallel.units import show_duration

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def run_lock(directory: str | Path, warn: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the run directory for as long as the block lasts. Taken by rank 0 alone.

    The file ``lock`` names the owner and is touched every ten seconds. One whose owner is gone - its process on this
    host, its own job before a requeue, or no touch for ninety seconds - is taken over. Another task of the same start
    of a job is no earlier one: it is there until its process or its silence shows otherwise. Ages are differences
    between two files of the same file system, whose clock may not be ours.
    ``warn``: told when a full disk leaves the run without a lock.
    Raises: RunInUseError: naming the owner and the age of its last sign of life.
    """
    path = Path(directory) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path, lambda who: f"run.directory = {path.parent} is in use by {who}; stop it, or name another run.name")
    except OSError as error:  # a directory that cannot be written is refused, with its reason, by RunDirectory.create
        if error.errno in FULL:
            warn(f"warning: {path} cannot be written ({error.strerror}); nothing keeps another job out of this run")
        yield
        return
    with beating(path):
        yield


@contextmanager
def held(path: Path, in_use: Callable[[str], str]) -> Iterator[None]:
    """Hold a lock as :func:`run_lock` does, at any path whose folder exists.

    ``in_use``: says in one line what cannot be, given who holds it.
    Raises: RunInUseError: with that line. OSError: the file cannot be made.
    """
    _take(path, in_use)
    with beating(path):
        yield


def _take(path: Path, in_use: Callable[[str], str]) -> None:
    while (owner := take(path, since=datetime.now(UTC).isoformat(timespec="seconds"))) is not None:
        age = age_seconds(path)
        if owner and not _is_gone(owner, age):
            job = f"job {owner['job']}, " if owner.get("job") else ""
            life = f"last sign of life {show_duration(age)} ago"
            raise RunInUseError(in_use(f"{job}process {owner['process']} on {owner['host']} ({life})"))
        discard(path, owner)


def _is_gone(owner: dict[str, object], age: float) -> bool:
    mine = me()
    if mine["job"] and owner["job"] == mine["job"] and int(str(owner["start"])) < int(str(mine["start"])):
        return True  # SLURM ends a job's processes before it starts it again
    if owner["host"] == mine["host"]:
        return not is_alive(owner["process"])
    return age > STALE_SECONDS
