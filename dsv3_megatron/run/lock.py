"""One job at a time in a run directory: two trainers would overwrite each other's checkpoints and metrics."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from parallel.errors import RunInUseError
from parallel.units import show_duration

BEAT_SECONDS = 10.0
STALE_SECONDS = 90.0


@contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Hold the run directory for as long as the block lasts. Taken by rank 0 alone.

    The file ``lock`` names the owner and is touched every ten seconds. One whose owner is gone - its process on this
    host, its own job before a requeue, or no touch for ninety seconds - is taken over. Ages are differences between
    two files of the same file system, whose clock may not be ours.
    Raises: RunInUseError: naming the owner and the age of its last sign of life.
    """
    path = Path(directory) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path)
    except OSError:  # a directory that cannot be written is refused, with its reason, by RunDirectory.create
        yield
        return
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if _owner(path) == _me():
            path.unlink(missing_ok=True)


def _me() -> dict[str, object]:
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "process": os.getpid(), "job": job}


def _take(path: Path) -> None:
    mine = json.dumps({**_me(), "since": datetime.now(UTC).isoformat(timespec="seconds")})
    while True:
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                file.write(mine)
            return
        except FileExistsError:
            owner, age = _owner(path), _age_seconds(path)
            if owner and not _is_gone(owner, age):
                job = f"job {owner['job']}, " if owner.get("job") else ""
                raise RunInUseError(
                    f"run.directory = {path.parent} is in use by {job}process {owner['process']} on {owner['host']} "
                    f"(last sign of life {show_duration(age)} ago); stop it, or name another run.name"
                ) from None
            path.unlink(missing_ok=True)


def _owner(path: Path) -> dict[str, object] | None:
    try:
        return {k: v for k, v in json.loads(path.read_text()).items() if k != "since"}
    except (OSError, ValueError, AttributeError):  # gone meanwhile, or torn: nobody's
        return None


def _is_gone(owner: dict[str, object], age: float) -> bool:
    me = _me()
    if me["job"] and owner.get("job") == me["job"]:  # SLURM ends a job's processes before it starts it again
        return owner["host"] != me["host"] or not _is_alive(owner["process"])
    if owner["host"] == me["host"]:
        return not _is_alive(owner["process"])
    return age > STALE_SECONDS


def _is_alive(process: object) -> bool:
    try:
        os.kill(int(str(process)), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def _age_seconds(path: Path) -> float:
    probe = path.with_name(f"lock.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
